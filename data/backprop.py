"""The same RWKV-7 in float32, trained by backpropagation: what EGGROLL starts from, and what it is compared with.

    python data/backprop.py pretrain --out thinker      on Countdown: a model that guesses answers, or thinks first
    python data/backprop.py grpo --out grpo             on rewards, from data/thinker.safetensors
    python data/backprop.py text --out text             on data/tales.txt: how few tokens a gradient needs

A new folder gets log.csv and model.safetensors, which has the official names, so that data/convert.py makes it int8.
Problems and rewards are those of data/countdown.py. Needs a CPU and: pip install torch safetensors
"""

import argparse
import csv
import itertools
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

try:
    import torch
    import torch.nn.functional as F
    from safetensors.torch import save_file
except ImportError as error:
    print(f"backprop: {error}: pip install torch safetensors", file=sys.stderr)
    sys.exit(2)

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import convert
import countdown
import nano_eggroll as E

Weights = dict[str, torch.Tensor]  # float32 [out, cols] or [out], by the names of Config.params
State = list[torch.Tensor]  # two token shifts [L, B, D] and S [L, B, H, N (value), N (key)], as in nano_eggroll.py
STOP = 10  # the newline that ends an answer; tokens are bytes
SEGMENT = 128  # bytes of a text to predict at once
GROUP = 4  # answers to a problem
GUESS = 0.75  # share of the last documents that guess

# ---------------------------------------------------------------------------------------------------------------------
# The model


def initial(cfg: E.Config, seed: int) -> Weights:
    """What the int8 entries of a new model of nano_eggroll.py stand for."""
    model = E.new_model(cfg, seed)
    scale = {n: model.scales(n)[:, None] if p.cols else model.scales(n) for n, p in cfg.params.items()}
    return {n: torch.tensor(model.weight(n) * scale[n]).requires_grad_() for n in scale}


def load(path: Path) -> tuple[E.Config, Weights]:
    """A model of bytes from an official .safetensors; raises UserError and OSError."""
    cfg, tensors = convert.checkpoint(path)
    with convert.reading(path, "RWKV-7", convert.OTHER_FILE):
        found = {n: torch.tensor(convert.entries(p, tensors[n])) for n, p in cfg.params.items()}
    return cfg, {n: (w if cfg.params[n].cols else w[:, 0]).contiguous().requires_grad_() for n, w in found.items()}


def save(cfg: E.Config, W: Weights, path: Path) -> None:
    """Write an official .safetensors of bfloat16."""
    found = {n: w.detach().bfloat16() for n, w in W.items()}
    found |= {n: w.T.contiguous() for n, w in found.items() if convert.TRANSPOSED.search(n)}
    save_file(found | {n: w.view(-1, cfg.head_size) for n, w in found.items() if n.endswith("r_k")}, path)


def recurrence(r: torch.Tensor, log_w: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kk: torch.Tensor,
               b: torch.Tensor, S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """y_t = S_t r_t of S_t = S_{t-1} diag(w_t) - (S_{t-1} kk_t) b_t^T + v_t k_t^T, for T <= 140 tokens at once.

    All [B, H, T, N]; S is [B, H, N, N]. Returns y, and S after the last token. With W_t = w_1 ... w_t (by entries) and
    u_t = -S_{t-1} kk_t, S_t = (S_0 + sum_{s <= t} u_s (b_s / W_s)^T + v_s (k_s / W_s)^T) diag(W_t), so that the u_t are
    the solution of a triangular system.
    """
    log_W = log_w.cumsum(-2)
    r, kk, k, b = r * log_W.exp(), kk * (log_W - log_w).exp(), k * (-log_W).exp(), b * (-log_W).exp()
    known = kk @ S.mT + (kk @ k.mT).tril(-1) @ v
    u = -torch.linalg.solve_triangular(kk @ b.mT, known, upper=False, unitriangular=True)
    y = r @ S.mT + (r @ b.mT).tril() @ u + (r @ k.mT).tril() @ v
    return y, (S + u.mT @ b + v.mT @ k) * log_W[..., -1:, :].exp()


def forward(cfg: E.Config, W: Weights, tokens: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State]:
    """Logits [B, T, V] of tokens [B, T], and the state after them: `step` of nano_eggroll.py for T tokens at once."""
    (B, T), D, N, L = tokens.shape, cfg.dim, cfg.head_size, cfg.layers
    state = state or [torch.zeros(L, B, D), torch.zeros(L, B, D), torch.zeros(L, B, D // N, N, N)]
    after: list[list[torch.Tensor]] = [[], [], []]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (D,), W[name + ".weight"], W[name + ".bias"])

    def token_shift(x: torch.Tensor, which: int) -> torch.Tensor:
        after[which].append(x[:, -1])
        return torch.cat([state[which][layer][:, None], x[:, :-1]], 1) - x

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.view(B, T, D // N, N).transpose(1, 2)

    x, v_first = norm("blocks.0.ln0", W["emb.weight"][tokens]), None
    for layer in range(L):
        P = {n.removeprefix(f"blocks.{layer}."): w for n, w in W.items()}
        h = norm(f"blocks.{layer}.ln1", x)
        dx = token_shift(h, 0)
        xr, xw, xk, xv, xa, xg = (h + dx * P[f"att.x_{n}"] for n in "rwkvag")
        r, k, v = (F.linear(h, P[f"att.{n}.weight"]) for h, n in ((xr, "receptance"), (xk, "key"), (xv, "value")))
        w = P["att.w0"] + F.linear(F.linear(xw, P["att.w1"]).tanh(), P["att.w2"])
        log_w = -math.exp(-0.5) * w.sigmoid()
        if v_first is None:
            v_first = v
        else:
            v = v + (v_first - v) * (P["att.v0"] + F.linear(F.linear(xv, P["att.v1"]), P["att.v2"])).sigmoid()
        a = (P["att.a0"] + F.linear(F.linear(xa, P["att.a1"]), P["att.a2"])).sigmoid()
        g = F.linear(F.linear(xg, P["att.g1"]).sigmoid(), P["att.g2"])
        kk = F.normalize(heads(k * P["att.k_k"]), dim=-1)
        k = k * (1 + (a - 1) * P["att.k_a"])
        y, S = recurrence(heads(r), heads(log_w), heads(k), heads(v), kk, kk * heads(a), state[2][layer])
        after[2].append(S)
        y = F.group_norm(y.transpose(1, 2).reshape(B * T, D), D // N, P["att.ln_x.weight"], P["att.ln_x.bias"], 64e-5)
        bonus = heads(r * k * P["att.r_k"]).sum(-1, keepdim=True) * heads(v)
        x = x + F.linear((y.view(B, T, D) + bonus.transpose(1, 2).reshape(B, T, D)) * g, P["att.output.weight"])
        h = norm(f"blocks.{layer}.ln2", x)
        h = F.linear(h + token_shift(h, 1) * P["ffn.x_k"], P["ffn.key.weight"]).relu()
        x = x + F.linear(h * h, P["ffn.value.weight"])
    return F.linear(norm("ln_out", x), W["head.weight"]), [torch.stack(part) for part in after]


@torch.no_grad()
def generate(cfg: E.Config, W: Weights, prompts: Sequence[bytes], length: int, temperature: float,
             dice: torch.Generator) -> list[bytes]:
    """What the model writes after each prompt, up to `length` bytes and with the newline that ends it, if there is one.

    All prompts go on together; those that have ended are dropped.
    """
    given = torch.tensor([len(p) for p in prompts])
    text = torch.full((len(prompts), int(given.max()) + length), STOP)
    for row, prompt in zip(text, prompts):
        row[:len(prompt)] = torch.tensor([*prompt])
    live, first = torch.arange(len(text)), int(given.min())
    logits, state = forward(cfg, W, text[:, :first])
    for t in range(first, text.shape[1]):
        chosen = logits[:, -1].argmax(-1)
        if temperature:
            chosen = torch.multinomial((logits[:, -1] / temperature).softmax(-1), 1, generator=dice)[:, 0]
        writing = t >= given[live]
        text[live[writing], t] = chosen[writing]
        going = ~(writing & (chosen == STOP)) & (t + 1 < given[live] + length)
        live, state = live[going], [part[:, going] for part in state]
        if not len(live):
            break
        logits, state = forward(cfg, W, text[live, t:t + 1], state)
    written = [bytes(row[n:n + length].tolist()) for row, n in zip(text, given.tolist())]
    return [w[:w.index(STOP) + 1] if STOP in w else w for w in written]


# ---------------------------------------------------------------------------------------------------------------------
# What to learn: the texts of a step, and what is measured by them

Text = tuple[bytes, bytes, float]  # what is given, what is to be written, and the weight of its loss
Texts = tuple[list[Text], dict[str, float]]


def pretrain(a: argparse.Namespace, rng: random.Random, progress: float) -> Texts:
    """Documents of Countdown. More and more of them guess; from a model (--load), all think."""
    problems = filter(lambda one: countdown.tenth(one) > 1, iter(lambda: countdown.problem(rng), None))
    guess = 0 if a.load else GUESS * progress  # above: the first tenth is held out, the second one is for tuning
    return [(one["prompt"].encode(), (countdown.document(rng, one, guess) + "\n").encode(), 1 / a.batch)
            for one in itertools.islice(problems, a.batch)], {}


def grpo(a: argparse.Namespace, rng: random.Random, cfg: E.Config, W: Weights, task: E.AnswerTask,
         dice: torch.Generator) -> Texts:
    """Group-relative policy optimisation (arXiv 2402.03300), without KL, and on-policy, so that nothing is clipped.

    Of each problem a group of answers is drawn; the advantage of an answer is its reward less the mean of its group,
    over their deviation, and the loss is the mean of advantage x nats over all bytes written.
    """
    problems = [one for one in rng.choices(task.train, k=a.batch // GROUP) for _ in range(GROUP)]
    prompts = [one.prompt.encode() for one in problems]
    answers = generate(cfg, W, prompts, task.length, 1.0, dice)
    rewards = task.rewards(problems, [answer.decode(errors="replace") for answer in answers]).reshape(-1, GROUP)
    spread = rewards.std(1, keepdims=True)
    advantages = ((rewards - rewards.mean(1, keepdims=True)) / (spread + 1e-4)).ravel().tolist()
    total = sum(len(answer) for answer, advantage in zip(answers, advantages) if advantage) or 1
    found = [(*text, advantage / total) for *text, advantage in zip(prompts, answers, advantages) if advantage]
    return found, {"train_reward": float(rewards.mean()), "equal_groups": float((spread == 0).mean())}


def segments(a: argparse.Namespace, rng: random.Random, text: bytes) -> Texts:
    """Some of a text."""
    starts = [rng.randrange(len(text) - SEGMENT) for _ in range(a.batch)]
    return [(text[i:i + 1], text[i + 1:i + SEGMENT + 1], 1 / (a.batch * SEGMENT)) for i in starts], {}


def adam_step(cfg: E.Config, W: Weights, optimizer: torch.optim.Optimizer, texts: Sequence[Text]) -> float:
    """Lower the weighted sum of the losses of texts, each in nats of all that is written; returns it.

    The gradient is clipped to a norm of 1. Texts of about the same length go together, sixteen at a time.
    """
    optimizer.zero_grad()
    total, texts = 0.0, sorted(texts, key=lambda text: len(text[0]) + len(text[1]))
    for part in (texts[i:i + 16] for i in range(0, len(texts), 16)):
        tokens = torch.full((len(part), max(len(given) + len(written) for given, written, _ in part)), STOP)
        weight = torch.zeros(tokens.shape)
        for row, w, (given, written, value) in zip(tokens, weight, part):
            row[:len(given) + len(written)] = torch.tensor([*given, *written])
            w[len(given):len(given) + len(written)] = value
        logits, _ = forward(cfg, W, tokens[:, :-1])
        nats = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        loss = (nats * weight[:, 1:].flatten()).sum()
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(W.values(), 1.0)
    optimizer.step()
    return total


def accuracy(cfg: E.Config, W: Weights, task: E.AnswerTask) -> dict[str, float]:
    """Of the likeliest answers to held-out problems, as nano_eggroll.py has it, and their mean length."""
    found = generate(cfg, W, [one.prompt.encode() for one in task.held], task.length, 0.0, torch.Generator())
    texts = [text.decode(errors="replace").removesuffix("\n") for text in found]
    return {"val_accuracy": float((task.rewards(task.held, texts) >= 1).mean()),
            "answer_length": sum(map(len, texts)) / len(texts)}


@torch.no_grad()
def bits(cfg: E.Config, W: Weights, val: bytes) -> dict[str, float]:
    """Bits/byte of a text, in whole segments, each from state zero."""
    tokens = torch.tensor([*val]).unfold(0, SEGMENT + 1, SEGMENT)
    logits = torch.cat([forward(cfg, W, part[:, :-1])[0] for part in tokens.split(64)])
    return {"val_bits": F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item() / math.log(2)}


def train(a: argparse.Namespace, cfg: E.Config, W: Weights, texts: Callable[[float], Texts],
          validate: Callable[[], dict[str, float]]) -> None:
    """Adam, with a learning rate that rises in the first 2% of the steps, and then falls linearly to 0."""
    optimizer = torch.optim.Adam(W.values(), betas=(0.9, 0.98), fused=True)
    rows, sums, tokens, seconds, every = [], {}, 0, 0.0, a.every or max(1, a.steps // 20)
    for step in range(a.steps + 1):
        if step % every == 0 or step == a.steps:
            rows.append({"step": step, "seconds": seconds, "tokens": tokens, **sums, **validate()})
            sums = {}
            print("  ".join(f"{name} {x:.4g}" for name, x in rows[-1].items()), flush=True)
            with open(a.out / "log.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, rows[-1], restval="nan")
                writer.writeheader()
                writer.writerows(rows)
        if step == a.steps:
            break
        began, progress = time.monotonic(), step / a.steps
        optimizer.param_groups[0]["lr"] = a.lr * min(1, 50 * (step + 1) / a.steps) * (1 - progress)
        found, measured = texts(progress)
        measured["train_nats"] = adam_step(cfg, W, optimizer, found)
        sums = {name: sums.get(name, 0) + x / every for name, x in measured.items()}
        tokens += sum(len(given) + len(written) for given, written, _ in found)
        seconds += time.monotonic() - began  # validations do not count


USUAL = {"pretrain": {"steps": 1000, "batch": 64, "lr": 4e-3}, "grpo": {"steps": 200, "batch": 64, "lr": 1e-4},
         "text": {"steps": 2000, "batch": 8, "lr": 4e-3}}


def main() -> None:
    """Run the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: p.exit(2, f"backprop: {message}\n")  # One line, without the usage.
    p.add_argument("way", choices=USUAL)
    p.add_argument("--out", type=Path, required=True, help="a new folder")
    p.add_argument("--task", type=Path, default=Path("countdown.jsonl"), help="problems (countdown.jsonl)")
    p.add_argument("--load", type=Path, help="start from this (grpo: data/thinker.safetensors)")
    p.add_argument("--steps", type=int, help=f"updates; this, --batch and --lr are else {USUAL}")
    p.add_argument("--batch", type=int, help="documents, answers or segments to a step")
    p.add_argument("--lr", type=float, help="learning rate at first; it falls to 0")
    p.add_argument("--every", type=int, help="steps from one validation to the next (a twentieth of all)")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    for name, value in USUAL[a.way].items():
        setattr(a, name, getattr(a, name) or value)
    if (min(a.steps, a.batch, a.every or 1) < 1 or (a.way == "grpo" and a.batch % GROUP) or not 0 < a.lr < 1
            or not 0 <= a.seed < 2**32):
        p.error(f"out of range: --steps, --batch (of grpo, a multiple of {GROUP}) and --every from 1, --lr 0 to 1, "
                "--seed from 0")
    torch.set_num_threads(1)  # so small a model gains nothing from more
    rng, dice = random.Random(a.seed), torch.Generator().manual_seed(a.seed)
    try:
        cfg = E.Config() if a.way == "text" else E.Config(dim=64, layers=2, head_size=32)
        file = a.load or (Path(__file__).with_name("thinker.safetensors") if a.way == "grpo" else None)
        cfg, W = load(file) if file else (cfg, initial(cfg, a.seed))
        text, val = E.read_text(E.DATA)
        s = E.Settings(task=str(a.task), reward=f"{countdown.__file__}:reward")
        task = None if a.way == "text" else E.AnswerTask(s, E.Vocab())
        a.out.mkdir(parents=True)
    except (E.UserError, OSError) as error:
        p.error(str(error))
    texts = {"pretrain": lambda progress: pretrain(a, rng, progress), "text": lambda _: segments(a, rng, text),
             "grpo": lambda _: grpo(a, rng, cfg, W, task, dice)}[a.way]
    train(a, cfg, W, texts, lambda: bits(cfg, W, val) if a.way == "text" else accuracy(cfg, W, task))
    save(cfg, W, a.out / "model.safetensors")


if __name__ == "__main__":
    main()
