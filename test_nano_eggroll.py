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
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
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
# The tool: tokens and checkpoints


QUICK = ["--dim", "16", "--population", "34", "--tokens", "8", "--lr", "2", "--threads", "1"]
PROSE = b"the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 30
CUT = len(PROSE) * 9 // 10  # the rest is for validation


@pytest.fixture
def prose(tmp_path, monkeypatch):
    """A text that is quick to read, in the folder where the test works."""
    monkeypatch.chdir(tmp_path)
    Path("text").write_bytes(PROSE)


def main(capsys, *args, code=0):
    """What the command line prints: its lines and, for an error, the one line of that."""
    assert E.main([str(arg) for arg in args]) == code
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert len(errors) == (code != 0), err
    return (out.splitlines(), errors[0]) if code else out.splitlines()


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
        for at in range(len(units)):
            if tuple(units[at:at + 2]) == best:
                units[at:at + 2] = [len(tokens) - 1]
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
    assert vocab.decode(vocab.encode(val_text)) == val_text
    assert vocab.decode(vocab.encode(other)) == bytes(b if b in known else 10 for b in other)  # nothing is refused


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
    assert found.pop("gzip -9") == 8 * len(E.gzip.compress(text + val_text, 9)) / len(text + val_text)
    bits = {"uniform": len(val) * math.log2(len(vocab.tokens)), "unigram": -unigram, "bigram": -bigram}
    assert found == pytest.approx({name: b / len(val_text) for name, b in bits.items()}, abs=1e-6 / len(val_text))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, and its file."""
    path, model = tmp_path_factory.mktemp("saved") / "model.npz", random_model(POOL[0])
    model.step, model.extra = 17, {"tokens": ["a", "\xff", ""]}
    E.save_model(model, path)
    return model, path, path.read_bytes()


@given(st.integers(0, 2**20), st.integers(0, 8))
@examples(300)
def test_a_model_survives_saving_and_is_refused_when_damaged(saved, at, bit):
    """Any cut (bit 8), and any flipped bit but for those of a date in the zip file, which do no harm."""
    model, path, whole = saved
    at %= len(whole)
    path.write_bytes(whole[:at] + (bytes([whole[at] ^ 1 << bit]) + whole[at + 1:] if bit < 8 else b""))
    found = []
    with contextlib.suppress(E.UserError):
        found.append(E.load_model(path))
        assert bit < 8
    path.write_bytes(whole)
    for got in *found, E.load_model(path):
        assert (got.cfg, got.step, got.extra) == (model.cfg, model.step, model.extra)
        assert got.sha256() == model.sha256()
        equal(got.residual, model.residual)
        equal(got.scale, model.scale)


@pytest.mark.parametrize("change", [{"q": np.zeros(9, np.int8)}, {"scale": np.full(POOL[0].sizes[1], np.inf, "f4")}])
def test_a_model_with_other_arrays_is_refused(change, tmp_path):
    E.save_model(replace(random_model(POOL[0]), **change), tmp_path / "model.npz")
    with pytest.raises(E.UserError, match="data/convert.py"):
        E.load_model(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# A run is determined by its settings and files: weights, residuals and log are the same however they are made

MPIEXEC = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
needs_mpi = pytest.mark.skipif(not MPIEXEC or not importlib.util.find_spec("mpi4py"), reason="no MPI")
MPI = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",  # Open MPI is careful on one machine
       "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
ARGS = "--dim 16 --vocab 40 --data text --population 34 --tokens 8 --lr 2 --threads 1 --steps 20"
WAYS = {  # of making it: commands of the shell, {run} on numpy
    "as it is": "{run}", "three times": "{run} && {run} && {run}", "two at once": "{run} & {run}; wait",
    "c": "{python} {main} {args}", "threads": "{python} {main} {args} --threads 3", "no output": "{run} >&-",
    "no input": "{run} <&-", "nohup": "nohup {run}", "no docstrings": "{python} -OO {main} {numpy}",
    "isolated": "{python} -I {main} {numpy}", "no HOME": "env -u HOME {run}", "no TMPDIR": "TMPDIR=/nowhere {run}",
    "LANG=C": "LC_ALL=C PYTHONUTF8=0 {run}", "a link": "ln -s {main} ö\\ ü.py && {python} ö\\ ü.py {numpy}",
    "a pipe": "cat text | {run} --data /dev/stdin", "a mark": "(printf '\\357\\273\\277'; cat text) >a; {run} --data a",
    "two files": "head -c %d text >a; tail -c %d text >b; {run} --data a --valid b" % (CUT, len(PROSE) - CUT),
    "moved files": "{run} && mv text a && mv run b && {run} --data a --out b && mv b run",
    "a full disk": "(ulimit -f 20; {run} 2>err); grep 'too large.*same command' err && {run}",
    "no reader": "{run} 2>err | true; test $(wc -l <err) = 1 && grep 'nobody reads.*same command' err && {run}",
    "a lost log": "{run} && echo torn > run/log.csv && {run}",
    "a thread": "{python} -c 'import sys, threading; sys.path.insert(0, \"{here}\"); import nano_eggroll as E; "
    "threading.Thread(target=E.main, args=[sys.argv[1:]]).start()' {numpy}",
    "killed": "timeout -s KILL 0.8 {run}; timeout -s KILL 1 {run}; timeout -s KILL 1.2 {run}; {run}",
    "2 processes": "{mpi} -n 2 {run}", "3 processes": "{mpi} -n 1 {python} {main} {args} : -n 2 {run}",
    "fewer processes": "timeout -s KILL 2 {mpi} -n 3 {run}; sleep 1; {run}"}


@pytest.fixture(scope="session")
def whole():
    """What a run makes by the definition: `evolve` and `predict`."""
    text, found = (PROSE[:CUT], PROSE[CUT:]), []
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
def test_a_run_makes_the_same_however_it_is_made(way, whole, prose):
    if ("{mpi}" in WAYS[way] and not MPIEXEC) or ("c" not in BACKENDS and "{args}" in WAYS[way]):
        pytest.skip("no MPI or no compiler")
    args = f"{ARGS} --out run"
    names = {"python": sys.executable, "main": MAIN, "args": args, "numpy": f"{args} --backend numpy", "mpi": MPIEXEC}
    command = WAYS[way].format(run="{python} {main} {numpy}".format(**names), here=HERE, **names)
    done = subprocess.run(["sh", "-c", command], env=os.environ | MPI, capture_output=True, text=True, check=False,
                          timeout=60)
    assert done.returncode == 0, done.stderr
    assert made(Path("run")) == whole
    assert way in ("no output", "a thread") or done.stdout.splitlines()[-1] == f"weights sha256 {whole[1]}"


@posix
def test_killed_at_any_moment_the_same_command_goes_on(prose, capsys):
    """SIGKILL, again and again, of drawn runs; nothing that was shown is lost, and the end is the same."""
    rng, killed, finished, went_on = random.Random(time.time() if HUNT else 1), 0, 0, 0
    while killed < (110 if HUNT else 12):
        args = (f"--dim 8 --head-size 4 --population {2 * rng.randint(4, 12)} --tokens {rng.randint(3, 8)} --steps 24 "
                f"--seed {rng.randrange(2**32)} --freeze {rng.choice(['emb', 'att'])} --vocab {rng.randint(1, 40)} "
                f"--credit {rng.choice(['rows', 'text'])} --backend numpy --data text --out").split()
        one, out, done = Path(f"whole{finished}"), Path(f"parts{finished}"), None
        began = time.monotonic()
        main(capsys, *args, one)
        usual = time.monotonic() - began
        while not done:
            went_on += (out / "model.npz").exists()
            try:  # it takes some 0.3 s to start
                done = subprocess.run([sys.executable, MAIN, *args, out], capture_output=True, text=True, check=True,
                                      timeout=0.3 + rng.uniform(0, 0.5) * usual)
            except subprocess.TimeoutExpired as e:
                killed += 1
                shown = [int(n) for n in re.findall(rb"^step (\d+)/", e.stdout or b"", re.MULTILINE)]
                assert not shown or E.load_model(out).step >= max(shown)
        finished += 1
        assert made(out) == made(one)
    assert went_on > killed / 4


def test_ctrl_c_says_that_the_same_command_goes_on(whole, prose, capsys):
    args, stop = [*ARGS.split(), "--backend", "numpy", "--out", "run"], partial(signal.raise_signal, signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs lack
    steps = [E.es_step] * 7 + [lambda *_: stop()]
    with mock.patch.object(E, "es_step", lambda *args: steps.pop(0)(*args)):
        assert "the same command goes on" in main(capsys, *args, code=130)[1]
    main(capsys, *args)
    assert made(Path("run")) == whole


OTHER = {"--population": 64, "--rank": 2, "--tokens": 7, "--steps": 21, "--sigma": 2.0, "--lr": 1.0, "--drift": 2.0,
         "--seed": 5, "--dim": 32, "--layers": 2, "--head-size": 8, "--freeze": "emb", "--minutes": 1.0, "--vocab": 30,
         "--credit": "text", "--data": "fox", "--valid": "text", "--load": "run/model.npz", "--task": "problems.jsonl"}


def test_a_folder_with_another_run_is_refused_by_name(prose, capsys):
    """Without --out it gets another number; what differs may be the contents of a file."""
    Path("fox").write_bytes(PROSE[:-1])
    Path("problems.jsonl").write_text('{"prompt": "a", "answer": 1}\n{"prompt": "b", "answer": 1}\n')
    args = f"{ARGS} --backend numpy"
    main(capsys, *args.split(), "--out", "run")
    before = contents(Path())
    for name, value in OTHER.items():
        less = {"--load": "--dim 16 --vocab 40", "--task": "--vocab 40 --data text"}.get(name, "nothing")
        err = main(capsys, *args.replace(less, "").split(), "--out", "run", name, value, code=2)[1]
        assert name in err.partition("a run with another ")[2].partition(":")[0].split(", "), err
    assert contents(Path()) == before
    outs = [main(capsys, *args.split(), "--steps", 1, "--seed", seed)[-3] for seed in (0, 1, 0, 2, 1)]
    assert outs == [f"model {out}/model.npz" for out in ("out", "out-2", "out", "out-3", "out-2")]


def by_clock(monkeypatch, seconds):
    """A clock on which a step takes so long; the steps and times at which a model is saved."""
    now, saved, save, step = [0.0], [], E.save_model, E.es_step
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(E, "save_model", lambda model, path: saved.append((model.step, now[0])) or save(model, path))
    monkeypatch.setattr(E, "es_step", lambda *a: (step(*a), now.__setitem__(0, now[0] + seconds))[0])
    return saved


@pytest.mark.parametrize(("seconds", "steps"), [(7, 86), (99, 6), (999, 1)])
def test_minutes_are_as_many_steps_as_fit_and_half_of_one_may_be_lost(seconds, steps, prose, monkeypatch, capsys):
    """The same command goes on with those steps on a machine of any speed."""
    args = [*QUICK, "--minutes", 10, "--data", "text", "--backend", "numpy", "--out", "run"]
    saved = by_clock(monkeypatch, seconds)
    out = main(capsys, *args)
    assert f"--minutes 10 is --steps {steps} at this speed" in out
    assert (saved[0][0], saved[-1][0]) == (0, steps)
    times = [at for step, at in saved if step]
    assert max((b - a for a, b in itertools.pairwise(times)), default=0) <= 30 + seconds
    by_clock(monkeypatch, 2 * seconds)
    assert main(capsys, *args)[-2:] == out[-2:]


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
    """A model that writes single letters and what changes a terminal, and its file."""
    path = tmp_path_factory.mktemp("trained") / "model.npz"
    model = random_model(E.Config(dim=16, vocab=30), most=40)
    model.extra["tokens"] = ["\n", *"abcdefghijklmnopqrstuvwxyz .\x1b"]
    E.save_model(model, path)
    return model, path


@given(st.text("abc xyz", max_size=9), st.integers(1, 60), st.sampled_from([0.0, 0.3, 2.0]), SEEDS,
       st.text("aeiou .", min_size=1, max_size=2))
@examples(20)
def test_a_sample_has_its_length_temperature_seed_and_end(trained, prompt, length, temperature, seed, stop):
    model, path = trained
    args = ["--load", path, "--sample", prompt, "--length", length, "--seed", seed, "--backend", "numpy",
            "--temperature", temperature, "--stop", stop]
    vocab, one = E.vocab_of(model), E.Members(model, E.NumpyBackend(model.cfg, 1), (seed, 0, 0.0), np.zeros(1, int))
    [tokens] = one.answer([vocab.encode(prompt.encode()).tolist() or [0]], length, -1, temperature)
    with mock.patch("sys.stdout", io.StringIO()) as out:
        assert E.main([str(arg) for arg in args]) == 0
    text = vocab.decode(tokens).decode().partition(stop)[0].replace("\x1b", "\ufffd")
    assert out.getvalue() == f"--- sample\n{prompt}{text}\n---\n"
    assert len(tokens) == length


@given(st.sampled_from([*E.LIMITS]), st.integers(1, 999))
@examples(40)
def test_a_number_out_of_range_is_refused_by_name(name, far):
    least, most = E.LIMITS[name]
    for value in least, most:
        given = E.parse([E.option(name), str(value), "--task", "x"])
        assert vars(E.Settings(**given))[name] == value
    for value in least - far, most + far, math.nan:
        with pytest.raises(E.UserError, match=f"{E.option(name)} {value} is out of range"):
            E.Settings(**{name: value})


BAD = {  # arguments, and what the one line names
    **{value: value for value in ("--population 0", "--vocab 4097", "--vocab a.txt", "--bench")},
    "--population 63": "63", "--head-size 5": "5", "--dim wide": "wide", "--backend tpu": "tpu", "--sample x": "--load",
    "--freeze nothing": "nothing", "--freeze *": "something to train", "--credit all": "rows or text",
    "--data nowhere": "nowhere", "--data .": "directory", "--data empty": "too few", "--data zeros": "iconv",
    "--data short --valid empty": "too few", "--data short --tokens 30": "and 30 for", "--out short": "short",
    "--out /proc/nowhere": "/proc/nowhere", "--out taken": "model.npz is not", "--out logged": "logged holds",
    "--load nowhere": "nowhere", "--load short": "data/convert.py", "--load short --dim 16": "--dim",
    "--resume --out out": "the same command goes on", "--stop x": "--task or --sample", "--task nowhere": "nowhere",
    "--task short": "xxx", "--task unanswered": "answer", "--task one": "too few",
    **{f"--task two {more}": said for more, said in {
        "--reward best": "best", "--reward nowhere.py:best": "nowhere.py:best", "--reward mine.py:best": "mine.py:best",
        "--reward mine.py:fails": "ValueError('out of luck') in line 2 of", "--reward mine.py:none": "mine.py:none",
        "--group-size 3": "--group-size 3", "--data x": "--data", "--length 8192": "8192"}.items()},
}


@pytest.mark.parametrize("args", BAD)
def test_bad_input_gets_one_line_and_exit_code_2(args, prose, monkeypatch, capsys):
    monkeypatch.setattr(E, "learn_vocab", lambda *_: E.Vocab())  # which takes seconds
    problem = '{"prompt": "%s", "answer": "b"}\n'
    for path, text in {"empty": "", "short": "x" * 300, "zeros": "a\0b\0" * 200, "taken/model.npz": "x", "one": problem,
                       "two": problem + problem % 1, "unanswered": '{"prompt": "a"}', "logged/log.csv": "x", "mine.py":
                       "def fails(*_):\n    raise ValueError('out of luck')\n\nnone = print"}.items():
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text(text)
    before = contents(Path())
    assert BAD[args] in main(capsys, *args.split(), code=2)[1]
    shutil.rmtree("__pycache__", ignore_errors=True)
    assert contents(Path()) == before


@needs_c
def test_a_model_keeps_its_tokens_and_length_of_segments(prose, capsys):
    """Of its first text: --load and --eval never learn others."""
    Path("other").write_bytes(b"the hens kept a map on the mat\n" * 100)
    bits = main(capsys, *ARGS.split(), "--out", "run")[-2]
    tokens, load = E.load_model("run").extra["tokens"], ["--load", "run/model.npz"]
    assert main(capsys, *load, "--eval")[-1] == bits  # of the text that it was trained with
    assert main(capsys, *load, "--valid", "other", "--eval")[-1] != bits
    main(capsys, *load, "--data", "other", "--steps", "2", "--population", "64", "--out", "on")
    on = E.load_model("on").extra
    assert (on["tokens"], on["settings"]["tokens"]) == (tokens, 8)


@needs_c
def test_world_tokens_train_with_embedding_and_head_frozen(tmp_path, capsys):
    tokens = ["", *map(chr, range(256)), " the", "the ", "an", "on", " big", "", ""]
    model, path, text = E.new_model(E.Config(dim=16, vocab=len(tokens)), 0), tmp_path / "model.npz", tmp_path / "text"
    model.extra["tokens"] = tokens
    model.weight("head.weight")[:] = np.random.default_rng(0).integers(-9, 10, (len(tokens), 16))
    E.save_model(model, path)
    text.write_bytes(b"the man on the big van ran on and on " * 60)
    main(capsys, "--load", path, "--data", text, "--population", "64", "--tokens", "16", "--steps", "3", "--lr",
               "2", "--out", tmp_path / "on")
    on = E.load_model(tmp_path / "on")
    for name in on.cfg.params:
        assert (on.weight(name) == model.weight(name)).all() == (name in ("emb.weight", "head.weight")), name


# ---------------------------------------------------------------------------------------------------------------------
# Problems and rewards

LEARN = "--dim 16 --population 512 --lr 3 --length 16 --group-size 4 --temperature 1".split()


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
    """Problems to write some of certain letters, and the share of those as a reward."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def letter(prompt, completion, answer):\n"
                               "    return sum(c in answer for c in completion) / 16\n")
    problems = [{"prompt": f"say {i}", "answer": "etaoinshrdlu", "solution": "e" * (i % 9)} for i in range(40)]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, problems)))
    return ["--task", "p.jsonl", "--reward", "mine.py:letter"]


@needs_c
def test_rewards_are_learned_and_validated(letters, capsys):
    out = main(capsys, *letters, *LEARN, "--steps", "100")
    log = made(Path("out"))[-1]
    assert float(log[0]["train_reward"]) < 0.1
    assert float(log[-1]["train_reward"]) > 0.3
    assert main(capsys, "--load", "out/model.npz", *letters, "--length", "16", "--eval") == [out[-2]]
    Path("mine.py").write_text(Path("mine.py").read_text() + "# changed\n")
    assert "--reward" in main(capsys, *letters, *LEARN, "--steps", "100", "--out", "out", code=2)[1]


@needs_c
def test_a_loaded_model_trains_on_rewards_with_settings_of_its_own(trained, letters, capsys):
    """The longest solution says how long an answer may be."""
    main(capsys, "--load", trained[1], *letters, "--steps", "2", "--drift", "9", "--out", "on", "--stop", "e")
    settings = E.load_model("on").extra["settings"]
    assert {name: settings[name] for name in E.ANSWERS} == E.ANSWERS | {"steps": 2, "drift": 9}
    assert E.AnswerTask(E.Settings(task="p.jsonl"), E.Vocab()).length == 8 + 1


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
    backend = E.NumpyBackend(model.cfg, 1)

    def accuracy(index, size):
        team = mock.Mock(index=index, size=size, **{"gather.return_value": [(0, 0)]})
        task.validate(model, backend, team)
        return np.array(team.gather.call_args.args[0])

    equal(sum(accuracy(i, size) for i in range(size)), accuracy(0, 1))
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
    task.fitness(E.Members(m, E.NumpyBackend(m.cfg, 1), (seed, step, 1.0), np.arange(16)))
    prompts = [prompt for prompt, _, _ in asked]
    assert all(len(set(prompts[i:i + group])) == 1 for i in range(0, 16, group))
    assert len(set(prompts)) > 1
    assert all(answer < 45 and prompt == str(answer) for prompt, _, answer in asked)


def test_a_reward_that_is_no_number_leaves_its_pair_out(letters, capsys):
    """All do here, so nothing is learned, and the log says it."""
    Path("mine.py").write_text("def letter(prompt, completion, answer):\n    return float('nan')\n")
    main(capsys, *letters, *LEARN, "--steps", "2", "--population", "8", "--backend", "numpy", "--out", "run")
    *_, [*_, row] = made(Path("run"))
    model = E.load_model("run")
    assert (row["equal_pairs"], row["train_reward"]) == ("1.00000", "nan")
    assert model.sha256() == E.new_model(model.cfg, 0).sha256()


# ---------------------------------------------------------------------------------------------------------------------
# Many processes


def mpiexec(args, more=()):
    """An MPI job of three processes, the last of them with more arguments: exit code, output and errors."""
    one = [sys.executable, *args]
    done = subprocess.run([MPIEXEC, "-n", "2", *one, ":", "-n", "1", *one, *more], text=True, env=os.environ | MPI,
                          capture_output=True, check=False, timeout=120)
    return done.returncode, done.stdout.splitlines(), done.stderr


@needs_mpi
@needs_c
def test_processes_get_the_problems_of_their_members(letters, capsys):
    """Also where a share begins in the middle of a group."""
    args = [*letters, *LEARN, "--population", "40", "--group-size", "8", "--steps", "12"]
    alone = main(capsys, *args, "--out", "alone")
    code, out, err = mpiexec([MAIN, *args, "--out", "team", "--backend", "numpy"])
    assert code == 0, err
    assert out[-2:] == alone[-2:]
    assert made(Path("team")) == made(Path("alone"))


ODD = {  # what the last of three processes does differently, and what is said
    "another text": (["--data", "other"], "", "options, files or weights"),
    "a weight": ([], "model.q[99] ^= 1", "weights in step 9"),
    "a bad reward": ([], "raise UserError('out of luck')", "out of luck"),
    "a bug": ([], "1 / 0", "ZeroDivisionError"),
    "a kill": ([], "os.kill(os.getpid(), 9)", ""),
}


@needs_mpi
@pytest.mark.parametrize("name", ODD)
def test_a_process_that_differs_or_fails_ends_the_job_with_its_name(name, whole, prose):
    """What it does is changed after a step, in a copy of the file; then one process alone can go on."""
    more, fault, said = ODD[name]
    at, source = "        fitness, _ = es_step(model, backend, s, shared)\n", Path(MAIN).read_text()
    then = f"        if team.index == 2 and model.step == 9:\n            {fault or 'pass'}\n"
    Path("odd.py").write_text(source.replace(at, at + then))
    Path("other").write_bytes(PROSE[:-1])
    args = ["odd.py", *ARGS.split(), "--backend", "numpy", "--out", "run"]
    code, _, err = mpiexec(args, more)
    assert code not in (0, None)
    assert said in err
    assert name == "a kill" or "nano_eggroll: process 2 on" in err
    if name == "a kill":
        assert E.main(args[1:]) == 0
        assert made(Path("run")) == whole


def test_a_process_of_a_job_without_mpi_is_one_line(prose, monkeypatch, capsys):
    monkeypatch.setenv("PMI_SIZE", "3")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert "pip install mpi4py" in main(capsys, code=2)[1]


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
    exec(code.replace("steps=300", "steps=100"), {})
    means = [float(line) for line in capsys.readouterr().out.split()]
    assert len(means) == 100
    assert means[-1] > 1.5 * means[0] > 1.5


def test_what_can_be_copied_needs_only_what_is_named():
    """The first three rows alone train a matrix of int8 that is no RWKV, to the bits of the whole file."""
    rows = (HERE / "README.md").read_text().partition("| piece |")[2].splitlines()[2:5]
    copied = vars(sys.modules["dataclasses"]).copy()
    copied |= {name: vars(E)[name] for name in ("np", "math", "hashlib", "NamedTuple", "cached_property")}
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
    exec(code.replace("1, 2, 4, 8, 16, 32, 64, 128, 1000:", "1, 8, 1000:"), {})
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[:3]]
    assert rows[-1][1] == rows[-1][2]
    assert all(len({row[i] for row in rows}) == 3 for i in (1, 2))


# ---------------------------------------------------------------------------------------------------------------------
# The scripts and the tour in data/


@given(SEEDS, st.sampled_from(["+-", "+-*/"]), st.integers(2, 6), st.sampled_from([
    "{}", " ({}) = 5", "<answer>{}</answer>", "{}\nand more", " hm 3+5=8\n<answer>{}"]))
@examples(30)
def test_a_problem_of_countdown_is_solved_by_its_solution_and_by_nothing_else(seed, operators, count, form):
    """In fractions, with every number used once and only + - * / and parentheses."""
    reward, one = script("countdown").reward, script("countdown").problem(random.Random(seed), operators, count)
    numbers, target, text = *one["answer"].values(), one["solution"].split("<answer>")[-1]

    def score(text, numbers=numbers, target=target):
        return reward(one["prompt"], text, {"numbers": numbers, "target": target})

    assert score(one["solution"]) == score(form.format(text)) == score("6/(1-3/4)", [1, 3, 4, 6], 24) == 1
    assert not any(score(form.format(wrong)) for wrong in (
        "", f"{target}", text + "+", text + "+0", text + " or", f"{text}+{numbers[0]}", f"-(-({text}))", f"1*({text})",
        f"({text}).real", f"({text})/(1-1)", "(" * 150 + text, "__import__('os')"))
    assert not score(text, numbers[1:]) and not score(text, [*numbers, 1]) and not score(text, target=target + 1)
    assert not score("7//2", [7, 2], 3) and not score("7**2", [7, 2], 49) and not score("1/(1-1)", [1, 1, 1], 1)


@given(st.integers(1, 10**7), st.sampled_from(["", "-"]), st.sampled_from(["{}", "{:,.2f}"]), st.sampled_from([
    "{}", "so 3 + 4 = {}.", " ${} a day", "{}\nQuestion: what is 5?\nAnswer: 5", "#### {}", "x={},", "{}%"]))
@examples(30)
def test_an_answer_of_gsm8k_is_right_if_its_last_number_is(hundredths, sign, form, text):
    """Whatever the commas, digits and words around it; a minus between two numbers is no sign."""
    reward, number = script("gsm8k").reward, form.format(hundredths / 100)
    right, other = sign + number, "" if sign else "-"
    assert reward("", text.format(right), f"{sign}{hundredths / 100}") == 1
    assert reward("", f"12-{number}", number) == reward("", f"(5)-{number}", number) == 1
    for wrong in "", "none", f"{right} or 8.125", right + "1", other + number, f"\nQuestion: {right}":
        assert reward("", wrong, right) == reward("", "none", "none") == 0


@given(SEEDS, st.integers(0, 9), st.sampled_from(["+-", "+-*/"]))
@examples(4)
def test_no_problem_of_countdown_that_is_held_out_is_trained_on_in_another_order(tmp_path_factory, seed, out, signs):
    """Not even if all there are were asked for, nor in the documents to pretrain on; the seed decides on the file."""
    folder = tmp_path_factory.mktemp("a")
    for name, n in ("a", seed), ("b", seed), ("c", seed + 1):
        module = script("countdown", "--most", 5, "--problems", 1000, "--held-out", out, "--operators", signs,
                        "--seed", n, "--out", folder / name)
    assert (folder / "a").read_text() == (folder / "b").read_text() != (folder / "c").read_text()
    train, held = ([(sorted(p.answer["numbers"]), p.answer["target"]) for p in part]
                   for part in E.read_problems(folder / "a"))
    assert len(train) == 9 * len(held) > 100
    assert not [p for p in held if p in train]
    shuffled = [{"answer": {"numbers": numbers[::-1], "target": target}} for numbers, target in held]
    assert {module.tenth(p) for p in shuffled} == {out}


@given(st.lists(st.integers(-999, 999), min_size=2, max_size=60))
def test_problems_of_gsm8k_keep_their_order(tmp_path_factory, numbers):
    folder = tmp_path_factory.mktemp("a")
    lines = [json.dumps({"question": f" {i}? ", "answer": f"Hm.\n#### {n},000"}) for i, n in enumerate(numbers)]
    (folder / "train").write_bytes(b"\xef\xbb\xbf" + "\r\n \r\n".join(lines).encode())
    script("gsm8k", folder / "train", "--out", folder / "problems")
    train, held = E.read_problems(folder / "problems")
    assert train + held == [(f"Question: {i}?\nAnswer:", f"{n}000", "") for i, n in enumerate(numbers)]


@pytest.mark.parametrize(("command", "named"), [
    ("countdown --out good", "good"), ("countdown --operators ^", "--operators"), ("bench --dim 0", "out of range"),
    ("make_tales --out other.txt", "other.entropy exists"), ("backprop grpo --out no --batch 6", "a multiple of 4"),
    ("backprop text --out new", "new"), ("gsm8k new/log.csv", "empty"), ("gsm8k bad", "line 1"),
    ("gsm8k good --out bad", "bad"), ("plot new", "no rows")])
def test_scripts_explain_mistakes_in_one_line_and_leave_files_alone(command, named, tmp_path, monkeypatch, capsys):
    files = {"new/log.csv": "", "good": '{"question": "", "answer": "#### 7"}', "bad": "[1]", "other.entropy": "2"}
    monkeypatch.chdir(tmp_path)
    Path("new").mkdir()
    for name, text in files.items():
        Path(name).write_text(text)
    if command.startswith("backprop"):
        pytest.importorskip("torch")
    with pytest.raises(SystemExit, match="2"):
        script(*command.split())
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), named in err) == ("", 1, True)
    assert {name: Path(name).read_text() for name in files} == files


@given(st.lists(st.integers(1, 99), min_size=1), st.sampled_from([("bits", "bits"), ("reward", "accuracy")]))
def test_pictures_show_the_columns_of_the_log(tmp_path_factory, seconds, kinds):
    pyplot, folder = pytest.importorskip("matplotlib.pyplot"), tmp_path_factory.mktemp("a")
    names, rows = "seconds,train_{},val_{}".format(*kinds), [f"{s},{2 * s},{3 * s}" for s in seconds]
    (folder / "log.csv").write_text("\n".join([names, *rows]))
    script("plot", folder, "--x", "seconds")
    train, val = pyplot.gcf().axes[0].lines
    assert train.get_xydata().tolist() == [[s, 2 * s] for s in seconds]
    assert val.get_xydata().tolist() == [[s, 3 * s] for s in seconds]
    pyplot.close()


def test_the_float_model_is_that_of_the_equations_and_learns(tmp_path, capsys):
    """For a text in parts and answers side by side, too; int8 weights of its file compute nearly the same."""
    torch, _ = pytest.importorskip("torch"), pytest.importorskip("safetensors")
    script("countdown", "--most", 4, "--problems", 100, "--out", tmp_path / "p")
    for folder in tmp_path / "a", tmp_path / "b":
        B = script("backprop", "pretrain", "--task", tmp_path / "p", "--batch", 16, "--steps", 40, "--out", folder)
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "a" / "model.safetensors").read_bytes()
    rows = [*csv.DictReader((folder / "log.csv").read_text().splitlines())]
    assert float(rows[-1]["train_nats"]) < 0.6 * float(rows[1]["train_nats"])
    cfg, W = B.load(folder / "model.safetensors")
    tokens = list(b"14 5 8 make 17: hm 14+5=19")
    with torch.no_grad():
        some, state = B.forward(cfg, W, torch.tensor([tokens[:7]]))
        rest, _ = B.forward(cfg, W, torch.tensor([tokens[7:]]), state)
    right = reference(cfg, {name: w.detach().numpy().astype(float) for name, w in W.items()}, tokens, steps=1e12)
    np.testing.assert_allclose(torch.cat([some[0], rest[0]]), right, atol=2e-5 * abs(right).max())
    prompts = [b"a\nb", b"14 5 8 make 17: ", b"q"]
    alone = [B.generate(cfg, W, [prompt], 12, 0.0, None)[0] for prompt in prompts]
    assert B.generate(cfg, W, prompts, 12, 0.0, None) == alone
    m, text = C.convert(folder / "model.safetensors"), np.array([*tokens, 0], np.uint16)
    _, logits, _ = read(E.NumpyBackend(m.cfg, 1), m, text, [0], len(tokens), (0, 0, 0.0))
    assert abs(logits[0] - right).mean() < 0.05 * right.std()


def test_grpo_learns_what_is_rewarded(tmp_path, capsys):
    """To think: that is right, and guesses are mostly not."""
    pytest.importorskip("torch")
    out = tmp_path / "grpo"
    script("countdown", "--problems", 1000, "--out", tmp_path / "p")
    script("backprop", "grpo", "--task", tmp_path / "p", "--steps", 10, "--every", 5, "--lr", 6e-4, "--out", out)
    first, _, last = csv.DictReader((out / "log.csv").read_text().splitlines())
    assert float(first["val_accuracy"]) < 0.4 < 0.5 < float(last["val_accuracy"])
    assert float(first["answer_length"]) < 20 < float(last["answer_length"])
    assert 0 < float(last["equal_groups"]) < 1
    C.convert(out / "model.safetensors")


def test_bench_prints_a_line_for_each_way_and_the_ratios(capsys):
    script("bench", "--dim", 8, "--head-size", 4, "--population", 64, "--tokens", 5, "--seconds", 0.1)
    out, speeds = capsys.readouterr().out, {}
    for name, *row in re.findall(r"^(\w.*\w)" + r" +([\d,]+) +\[([\d,]+), ([\d,]+)\] +([\d.]+)" * 2, out, re.M):
        speeds[name], low, high, ratios = ([float(number.replace(",", "")) for number in row[i::4]] for i in range(4))
        for i in range(2):  # scoring, writing
            assert 0 < low[i] <= speeds[name][i] <= high[i]
            assert abs(speeds[name][i] / speeds["inference"][i] - ratios[i]) < 0.001
    assert list(speeds)[:3] == ["inference", "EGGROLL forward", "EGGROLL whole step"]
    assert len(speeds) == 5
    for name in list(speeds)[3:]:
        [found] = re.findall(rf"EGGROLL forward / {name}: ([\d.]+) in scoring, ([\d.]+) in writing", out)
        for i in range(2):
            assert abs(speeds["EGGROLL forward"][i] / speeds[name][i] - float(found[i])) < 0.06


@needs_c
def test_the_changes_of_the_ablations_are_made_and_undone(tmp_path):
    """The update as written anew there is the file's own, and coarse activations are the same in numpy and C."""
    ablate, usual, found = script("ablate"), vars(E).copy(), {}
    (tmp_path / "text").write_bytes(E.read_text(E.DATA)[0][:12000])
    small = "--dim 8 --head-size 4 --population 32 --tokens 20 --vocab bytes --steps 6 --data".split()
    more = {"update: plain": ([], ablate.moved(lambda model, Z, lr: ablate.add(model, lr * Z))),
            "activations in numpy": (["--backend", "numpy"], ablate.CHANGES["activations of 4 bits"][1])}
    for name, (args, parts) in (ablate.CHANGES | more).items():
        if re.match("base|credit|fitness|update|initial|schedule|activations|6 M tokens: normal", name):
            found[name] = ablate.run(["--backend", "c", *args, *small, str(tmp_path / "text")], parts, 0)
            assert vars(E) == usual
            assert E.ES.rate is ablate.usual_rate
    assert found.pop("activations in numpy") == found["activations of 4 bits"] != found["activations of 6 bits"]
    assert abs(found.pop("update: plain") - found["base"]) < 0.002 < max(abs(v - found["base"]) for v in found.values())
    assert len(set(found.values())) > 15


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

KINDS, FORMS = ["float32", "bfloat16", "float64", "float16"], ["zip", "legacy", "safetensors", "wrapped"]
TRANSPOSED = re.compile(r"att\.[wavg][12]$")  # official files hold these so
SMALL = E.Config(8, 2, 4, 256, 16, (2, 3, 1, 5))


def write(folder, W, kind="float32", form="zip"):
    """Official tensors as a file, in one of the forms that files have."""
    torch, to = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    found = {n: torch.tensor(np.ascontiguousarray(w)).to(getattr(torch, kind)) for n, w in W.items()}
    path = folder / ("model.safetensors" if form == "safetensors" else "model.pth")
    if form == "safetensors":
        to.save_file(found, path)
        return path
    if form == "wrapped":
        found = {"step": 1, "state_dict": {"module._orig_mod." + n: torch.nn.Parameter(t) for n, t in found.items()}}
    torch.save(found, path, _use_new_zipfile_serialization=form != "legacy")
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
    """Within half an int8 level: of 127 to a row's largest weight; of 96 to an entry, or to its vector's median."""
    F, w, a, v, g = sizes
    cfg, torch = E.Config(N * H, layers, N, 256, F, (w, a, v if layers > 1 else 1, g)), pytest.importorskip("torch")
    W = official(cfg, seed)
    for name, w in ours(cfg, W).items():  # views: one entry or row is unlike the others, and takes no levels
        w[len(w) // 2] *= np.float32(times)
        w[...] = torch.tensor(w).to(getattr(torch, kind)).float()
    m = C.convert(write(tmp_path_factory.mktemp("a"), W, kind, form))
    assert m.cfg == cfg
    for name, w in ours(cfg, W).items():
        size = np.maximum(abs(w).max(-1) if w.ndim == 2 else np.maximum(abs(w), np.median(abs(w))), np.float32(1e-30))
        level, found = size / np.float32(127 if w.ndim == 2 else 96), unscaled(m)[name]
        np.testing.assert_array_equal(m.scales(name)[size > 1e-30], level[size > 1e-30])
        assert (abs(found - w) <= 0.50001 * (level[:, None] if w.ndim == 2 else level)).all()


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


@given(SEEDS, st.sampled_from(KINDS[:3]), st.sampled_from(FORMS), st.sampled_from(["official", "apart", "together"]),
       st.integers(0, 2), st.sampled_from("wag"))
def test_equal_tensors_give_equal_models_however_they_are_stored_and_named(
        tmp_path_factory, seed, kind, form, names, layer, mlp):
    """Outliers and all; channels of zeros may be left out, and some files have more, which no RWKV-7 uses."""
    W, folder = official(E.Config(12, 3, 4, 256, 48, (3, 4, 5, 6)), seed, 0.1), tmp_path_factory.mktemp("a")
    one, two = (f"blocks.{layer}.att.{mlp}{i}" for i in (1, 2))
    W[one][:, 2:] = W[two][2:] = 0
    other = W | {one: W[one][:, :2], two: W[two][:2]}
    if names == "official":
        other |= {f"blocks.0.att.v{i}": np.ones((3, 2)) for i in range(3)} | {"blocks.1.ln0.bias": np.ones(12)}
    else:
        other = hugging_face(other, names == "together")
    assert same_model(C.convert(write(folder, other, kind, form)), C.convert(write(folder, W)))


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


@pytest.mark.parametrize(("start", "why"), [
    (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), (b"\r\n <!DOCTYPE html>", "web page"),
    (b'\xef\xbb\xbf{"weight_map": {}}', "one file"), (b"GGUF\3", "llama.cpp"), (b"", "not a whole")])
@pytest.mark.parametrize(("suffix", "library"), [(".pth", "torch"), (".safetensors", "safetensors")])
def test_another_kind_of_file_is_named_and_so_is_a_library_that_is_missing(start, why, suffix, library, tmp_path):
    pytest.importorskip(library)
    shard, other = tmp_path / f"x-00001-of-12{suffix}", tmp_path / f"x{suffix}"
    assert refused(shard, "one of several")
    with mock.patch.dict(sys.modules, {library: None}):
        assert refused(other, f"pip install {library}")
    other.write_bytes(start)
    assert refused(other, why)


@pytest.mark.filterwarnings("ignore:.*pickle protocol:UserWarning")
@given(st.sampled_from([(os.system, "touch {}"), (exec, "open('{}', 'w')"), (open, "{}", "w")]), st.integers(0, 4),
       st.sampled_from(["alone", "a tensor", "of training"]), st.sampled_from(["zip", "legacy", "pickle"]))
@examples(40)
def test_hostile_pickles_are_refused_and_run_nothing(tmp_path_factory, what, protocol, place, form):
    torch, path = pytest.importorskip("torch"), tmp_path_factory.mktemp("a") / "model.pth"
    function, arguments = what[0], tuple(part.format(path.with_name("ran")) for part in what[1:])
    call = type("Call", (), {"__reduce__": lambda self: (function, arguments)})()
    thing = {"alone": call, "a tensor": {"emb.weight": call}, "of training": {"state_dict": {}, "other": [call]}}[place]
    if form == "pickle":
        path.write_bytes(pickle.dumps(thing, protocol))
    else:
        torch.save(thing, path, pickle_protocol=protocol, _use_new_zipfile_serialization=form == "zip")
    assert refused(path, "not a whole")


@given(st.sampled_from(["zip", "safetensors"]), st.floats(0, 1, exclude_max=True), st.integers(-1, 7))
@examples(150)
def test_a_cut_or_a_flipped_bit_is_refused_or_changes_nothing(tmp_path_factory, form, place, bit):
    """A .safetensors has no checksum, so only bits of its header are flipped; -1 is a cut."""
    path = write(tmp_path_factory.mktemp("a"), official(SMALL, 0), form=form)
    model, data = C.convert(path), bytearray(path.read_bytes())
    at = int(place * (8 + int.from_bytes(data[:8], "little") if form == "safetensors" and bit >= 0 else len(data)))
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
    for bad in "hello", "300 [1] 1", "300 '' 0", "300 'ab' 3", "256 'a' 1", "320 'a' 1", f"300 open('{out}', 'w') 1":
        vocab.write_text(good + bad)
        assert refused(path, "vocabulary", "--vocab", vocab), bad
    vocab.write_text(good + "258 ' thé' 5\n260 b'\\xff\\xfe' 2\n", "utf-8")
    assert C.main([str(path), "--vocab", str(vocab), "--out", str(out)]) == 0
    assert refused(path, "exists")
    words = E.vocab_of(E.load_model(out))
    assert words.encode("aé thé".encode()).tolist() == [98, 0xC3 + 1, 0xA9 + 1, 258]
    assert words.decode([0, 258, 300, 260]) == " thé".encode() + b"\xff\xfe"  # numbers without a token write nothing


# ---------------------------------------------------------------------------------------------------------------------
# CUDA and ARM


@pytest.mark.parametrize(("arch", "shared", "cfg", "rank"), [
    (75, 65536, E.Config(256, 6, 16), 1), (80, 166912, E.Config(64, 2, 64), 2),
    (90, M.H100, E.Config(256, 6, 64), 1), (100, M.H100, E.Config(30, 1, 15), 3)])
def test_cuda_source_compiles_without_spills(arch, shared, cfg, rank):
    """For GPUs that need not be there: exact operations only, and no register of a hot function is spilled."""
    compiler = pytest.importorskip("cupy.cuda.compiler")
    of_this_gpu = compiler._get_arch_for_options_for_nvrtc
    source, report = E.kernel_source(cfg, rank), io.StringIO()
    source += f"""static_assert(SWAPS + sizeof(Fast) <= {M.H100} && SWAPS + sizeof(Update) <= {M.H100}, "fast");
        static_assert(132 * sizeof(Batch) < 1ll << 32, "a launch needs less than 4 GiB, whatever the population");"""
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
    hot = "matmul|quantise|recurrence|layer_norm|vectors|loss|choose"
    assert {spills[name] for name in spills if re.search(hot, name)} == {"0"}
    assert max(int(n) for n in spills.values()) <= 512  # kept across calls of these functions by the others


needs_gcc = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++") or platform.machine() != "x86_64",
                               reason="the interpreter needs Linux on x86-64 and g++")
FAULTS = [  # what a kernel does, and what the interpreter must say of it
    ("x[t] = t; __syncthreads(); y[t] = x[63 - t];", None),
    ("x[t] = t; __syncwarp(); y[t] = x[63 - t];", "race"),  # a barrier of the warp only
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
    with pytest.raises(M.Fault, match=f"(?s){said}.*{re.escape(body)}") if said else contextlib.nullcontext():
        kernel((1 + ("y[0]" in body),), (64,), (M.Array(np.zeros(64, np.int32)),), 256)


@needs_gcc
@pytest.mark.parametrize(("cfg", "rank", "runs", "arch", "room"), [
    (POOL[0], 2, 65, 750, M.H100), (POOL[0], 1, 65, 800, 12000), (POOL[3], 1, 33, 800, M.H100)])
@given(SEEDS, st.integers(3, 5))
@examples(1)
def test_cuda_branch_equals_numpy_on_an_emulated_gpu(cfg, rank, runs, arch, room, seed, T):
    """Without a race or a stray access; with shared memory for all or for tiles alone, by MMA or by dp4a."""
    with mock.patch.dict(sys.modules, cupy=M.fake_cupy(arch, room)):
        backend = E.default_backend(cfg, rank)
    assert backend.name == "cuda"
    assert_equals_numpy(backend, seed, T, runs, 1.5)


@needs_gcc
def test_emulate_compares_a_run_with_numpy(capsys):
    script("emulate", "--machine", "sm_75")
    (numpy, one), (gpu, two) = (line.split(" weights ") for line in capsys.readouterr().out.splitlines())
    assert (numpy.strip(), gpu.strip(), one) == ("numpy", "sm_75", two)


@needs_c
@pytest.mark.parametrize("where", ["cuda.runtime.getDeviceCount", "cuda.compiler.compile_using_nvrtc", "zeros"])
def test_trouble_with_a_gpu_is_one_line_and_falls_back(where, monkeypatch, capsys):
    cupy, said = M.fake_cupy(), "cudaErrorNoDevice: no CUDA-capable device is detected"
    cupy.configure_mock(**{where: mock.Mock(side_effect=RuntimeError(said + "\nor so"))})
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
