"""The same RWKV-7 in float32, trained by backpropagation: what EGGROLL starts from, and what it is compared with.

    python data/backprop.py pretrain --out thinker.safetensors       a model that guesses answers, or thinks first
    python data/backprop.py grpo data/thinker.safetensors countdown.jsonl --reward data/countdown.py:reward --out grpo
    python data/backprop.py text data/tales.txt --out text           how few tokens a gradient needs, where there is one

Needs torch, on a CPU, and safetensors: pip install torch safetensors. The weights have the names and shapes of
nano_eggroll.py; files have the official ones, so that data/convert.py makes int8 models of them.
"""

import argparse
import csv
import math
import random
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

try:
    import torch
    import torch.nn.functional as F
    from safetensors.torch import save_file
except ImportError as error:
    sys.exit(print(f"backprop: {error}: pip install torch safetensors", file=sys.stderr) or 2)

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import convert
import countdown
import nano_eggroll as E

Weights = dict[str, torch.Tensor]  # float32 [out, cols] or [out], by the names of Config.params
State = list[torch.Tensor]  # two token shifts [L, B, D] and S [L, B, H, N (value), N (key)], as in nano_eggroll.py
STOP = 10  # the newline that ends an answer; tokens are bytes

# ---------------------------------------------------------------------------------------------------------------------
# The model


def of_model(model: E.Model) -> Weights:
    """What the int8 entries of a model stand for."""
    scale = {n: model.scales(n)[:, None] if p.cols else model.scales(n) for n, p in model.cfg.params.items()}
    return {n: torch.tensor(model.weight(n) * scale[n]).requires_grad_() for n in scale}


def load(path: Path) -> tuple[E.Config, Weights]:
    """A model of bytes from an official .safetensors; raises UserError and OSError."""
    with convert.reading(path, "RWKV-7", convert.OTHER_FILE), open(path, "rb") as file:
        tensors = convert.read_safetensors(file)
        cfg = convert.official_config(tensors)
        found = {n: torch.tensor(convert.entries(p, tensors[n])) for n, p in cfg.params.items()}
    return cfg, {n: (w if cfg.params[n].cols else w[:, 0]).contiguous().requires_grad_() for n, w in found.items()}


def save(cfg: E.Config, W: Weights, path: Path) -> None:
    """Write an official .safetensors of bfloat16."""
    def official(name: str, w: torch.Tensor) -> torch.Tensor:
        if re.search(r"\.att\.[wavg][12]$", name):
            return w.T.contiguous()
        if name.endswith("r_k"):
            return w.view(-1, cfg.head_size)
        return w.view(1, 1, -1) if re.search(r"\.(x_[rwkvag]|[wav]0|k_[ka])$", name) else w

    save_file({n: official(n, w.detach().bfloat16()) for n, w in W.items()}, path)


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
        last = logits[:, -1]
        chosen = torch.multinomial((last / temperature).softmax(-1), 1, generator=dice)[:, 0] if temperature else last.argmax(-1)
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
# Learning


class Adam:
    """Adam with gradients clipped to a norm of 1, and the loss that all three ways of training have."""

    def __init__(self, cfg: E.Config, W: Weights, lr: float) -> None:
        """Of these weights, which change."""
        self.cfg, self.W, self.lr = cfg, W, lr
        self.optimizer = torch.optim.Adam(W.values(), betas=(0.9, 0.98), fused=True)

    def step(self, texts: Sequence[tuple[bytes, bytes, float]], rate: float) -> float:
        """Lower sum_i w_i loss_i of texts (given, written, w), by lr x rate; loss_i is in nats, of all that is written.

        Texts of about the same length go together. Returns the sum.
        """
        self.optimizer.zero_grad()
        total, texts = 0.0, sorted(texts, key=lambda text: len(text[0]) + len(text[1]))
        for i in range(0, len(texts), 16):
            part = texts[i:i + 16]
            tokens = torch.full((len(part), max(len(given) + len(written) for given, written, _ in part)), STOP)
            weight = torch.zeros(tokens.shape)
            for row, w, (given, written, value) in zip(tokens, weight, part):
                row[:len(given) + len(written)] = torch.tensor([*given, *written])
                w[len(given):len(given) + len(written)] = value
            logits, _ = forward(self.cfg, self.W, tokens[:, :-1])
            nats = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
            loss = (nats * weight[:, 1:].flatten()).sum()
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.W.values(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * rate
        self.optimizer.step()
        return total


class Log:
    """log.csv in a new folder, of the columns that nano_eggroll.py has, and a clock that validations do not count in."""

    def __init__(self, out: Path) -> None:
        """Raises OSError."""
        out.mkdir(parents=True)
        self.file, self.began = open(out / "log.csv", "w", newline=""), time.monotonic()

    def seconds(self) -> float:
        """Of training."""
        return time.monotonic() - self.began

    def write(self, row: dict[str, float], at: float) -> None:
        """Add a row, print it, and set the clock to what it was when the validation began."""
        row = {name: round(x, 4) for name, x in row.items()}
        writer = csv.DictWriter(self.file, row)
        if not self.file.tell():
            writer.writeheader()
        writer.writerow(row)
        self.file.flush()
        print("  ".join(f"{name} {x:g}" for name, x in row.items()), flush=True)
        self.began = time.monotonic() - at


def accuracy(cfg: E.Config, W: Weights, task: E.AnswerTask, dice: torch.Generator) -> dict[str, float]:
    """Of the likeliest answers to a task's held-out problems, as nano_eggroll.py has it, and their mean length."""
    found = generate(cfg, W, [prompt.encode() for prompt, _ in task.held], task.length, 0.0, dice)
    texts = [text.decode(errors="replace").removesuffix("\n") for text in found]
    return {"val_accuracy": float((task.rewards(task.held, texts) >= 1).mean()),
            "answer_length": sum(map(len, texts)) / len(texts)}


def pretrain(a: argparse.Namespace, log: Log) -> tuple[E.Config, Weights]:
    """On documents of Countdown, of which more and more guess; or, from a model, on the right thoughts alone."""
    rng, dice = random.Random(a.seed), torch.Generator().manual_seed(a.seed)
    cfg = E.Config(a.dim, a.layers, a.head_size)
    cfg, W = load(a.load) if a.load else (cfg, of_model(E.new_model(cfg, a.seed)))
    task = E.AnswerTask(E.Settings(task=str(a.task), reward=f"{countdown.__file__}:reward", length=64), E.Vocab())
    adam, tokens, loss = Adam(cfg, W, a.lr), 0, 0.0
    for step in range(a.steps):
        texts = []
        while len(texts) < a.batch:
            one = countdown.problem(rng)
            if countdown.tenth(one) > 1:  # the first tenth is to be held out, the second one is for tuning
                written = countdown.document(rng, one, a.guess * (1 if a.load else step / a.steps)) + "\n"
                texts.append((one["prompt"].encode(), written.encode(), 1 / a.batch))
        tokens += sum(len(given) + len(written) for given, written, _ in texts)
        loss += adam.step(texts, min(1, (step + 1) / 50) * (1 - step / a.steps))
        if (step + 1) % (a.steps // 20) == 0:
            at = log.seconds()
            log.write({"step": step + 1, "seconds": at, "tokens": tokens, "train_nats": loss / (a.steps // 20),
                       **accuracy(cfg, W, task, dice)}, at)
            loss = 0.0
    return cfg, W


def grpo(a: argparse.Namespace, log: Log) -> tuple[E.Config, Weights]:
    """Group-relative policy optimisation (arXiv 2402.03300): on-policy, so that nothing is clipped, and without KL.

    Of each problem, `group` answers are drawn; an answer's advantage is its reward, less the mean of its group, over
    their deviation; the loss is the mean over the tokens of advantage x nats.
    """
    rng, dice = random.Random(a.seed), torch.Generator().manual_seed(a.seed)
    cfg, W = load(a.load)
    task = E.AnswerTask(E.Settings(task=str(a.task), reward=a.reward, length=a.length), E.Vocab())
    adam, step, written, due, rewards, equal = Adam(cfg, W, a.lr), 0, 0, 0.0, [0.0], [0.0]
    while True:
        at = log.seconds()
        if at >= due * 60 * a.minutes:
            log.write({"step": step, "seconds": at, "answers": written, "train_reward": float(np.mean(rewards)),
                       "equal_groups": float(np.mean(equal)), **accuracy(cfg, W, task, dice)}, at)
            due, rewards, equal = due + 0.05, [], []
        if at >= 60 * a.minutes:
            return cfg, W
        problems = [one for one in rng.choices(task.train, k=a.prompts) for _ in range(a.group)]
        prompts = [prompt.encode() for prompt, _ in problems]
        answers = generate(cfg, W, prompts, task.length, 1.0, dice)
        reward = task.rewards(problems, [answer.decode(errors="replace").removesuffix("\n") for answer in answers])
        groups = reward.reshape(-1, a.group)
        advantage = ((groups - groups.mean(1, keepdims=True)) / (groups.std(1, keepdims=True) + 1e-4)).ravel()
        used = np.flatnonzero(advantage)
        if len(used):
            total = sum(len(answers[i]) for i in used)
            adam.step([(prompts[i], answers[i], float(advantage[i]) / total) for i in used],
                      max(0.05, 1 - at / (60 * a.minutes)))
        rewards.append(float(reward.mean()))
        equal.append(float((groups.std(1) == 0).mean()))
        step, written = step + 1, written + len(answers)


def text(a: argparse.Namespace, log: Log) -> tuple[E.Config, Weights]:
    """To predict the bytes of a text, from the initial weights that nano_eggroll.py has."""
    train, val = (np.frombuffer(t, np.uint8) for t in E.read_text(a.data))
    cfg = E.Config(a.dim, a.layers, a.head_size)
    W, rng, T = of_model(E.new_model(cfg, a.seed)), random.Random(a.seed), a.tokens
    adam, due = Adam(cfg, W, a.lr), 0.0
    segments = [val[i:i + T + 1] for i in range(0, len(val) - T - 1, T)]
    checked = torch.tensor(np.stack(segments), dtype=torch.long)
    for step in range(a.steps + 1):
        if step >= due or step == a.steps:
            at = log.seconds()
            with torch.no_grad():
                logits = torch.cat([forward(cfg, W, part[:, :-1])[0] for part in checked.split(64)])
            nats = F.cross_entropy(logits.flatten(0, 1), checked[:, 1:].flatten())
            log.write({"step": step, "seconds": at, "tokens": step * a.batch * T, "val_bits": nats.item() / math.log(2)}, at)
            due = max(step + 4, step * 1.1)
        starts = [rng.randrange(len(train) - T - 1) for _ in range(a.batch)]
        adam.step([(train[i:i + 1].tobytes(), train[i + 1:i + T + 1].tobytes(), 1 / (a.batch * T)) for i in starts],
                  min(1, (step + 1) / 50))
    return cfg, W


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    options = {"lr": 3e-3, "seed": 0, "threads": 1}
    shape = {"dim": 64, "layers": 2, "head_size": 32}
    for run, own in ((pretrain, {"task": Path("countdown.jsonl"), "load": Path(), "steps": 4000, "batch": 64, "guess": 0.75} | shape),
                     (grpo, {"load": Path("data/thinker.safetensors"), "task": Path("countdown.jsonl"), "reward": "data/countdown.py:reward", "prompts": 8, "group": 8, "length": 48, "minutes": 1.5}),
                     (text, {"data": E.DATA, "tokens": 128, "batch": 8, "steps": 2000} | shape)):
        p = commands.add_parser(run.__name__, help=run.__doc__.partition("\n")[0])
        p.add_argument("--out", type=Path, required=True, help="a new folder")
        p.set_defaults(run=run)
        for name, value in (options | own).items():
            p.add_argument("--" + name.replace("_", "-"), type=type(value) if not isinstance(value, Path) else Path, default=value, help=f"({value})")
    a = parser.parse_args()
    a.load = None if getattr(a, "load", None) == Path() else getattr(a, "load", None)
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    cfg, W = a.run(a, Log(a.out))
    save(cfg, W, a.out / "model.safetensors")


if __name__ == "__main__":
    main()
