"""Countdown, make a target of some numbers: writes problems as JSON lines, and scores answers to them.

    python data/countdown.py                                                     # countdown.jsonl: 14 5 8 make 17:
    python data/countdown.py --operators "+-*/" --count 4 --most 50              # harder ones
    python nano_eggroll.py --load model.npz --task countdown.jsonl --reward data/countdown.py:reward

Each problem can be solved, since its target is what came of its numbers, every one used once, in a random order. All
prompts differ, and the last tenth of the file is held out for good: a hash of the sorted numbers and the target says
which problems these are, so that none of them is trained on with its numbers in another order. A `solution` goes along;
training does not see it. `document` writes what a model can be pretrained on: answers that guess, or think first.
"""

import argparse
import ast
import contextlib
import itertools
import json
import operator
import random
import re
import zlib
from fractions import Fraction
from pathlib import Path

OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def reward(prompt: str, completion: str, answer: dict) -> float:
    """1 if the first line is an expression of + - * / that makes answer["target"] of answer["numbers"], each used once.

    What comes after a = does not count, nor do spaces, and <answer> tags may surround the expression.
    """
    left, target = list(answer["numbers"]), answer["target"]
    text = completion.split("<answer>")[-1].split("</answer>")[0].strip().partition("\n")[0].partition("=")[0].strip()
    if not re.fullmatch("[0-9 +*/()-]{1,200}", text):
        return 0.0
    try:
        return float(value(ast.parse(text, mode="eval").body, left) == target and not left)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):  # the last two: of parentheses
        return 0.0


def value(node: ast.expr, left: list[int]) -> Fraction:
    """What an expression comes to; takes its numbers from those left. ValueError if one is not there, or for a sign."""
    if isinstance(node, ast.Constant):
        left.remove(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](value(node.left, left), value(node.right, left))
    raise ValueError("not an expression of + - * /")


def problem(rng: random.Random, operators: str = "+-", count: int = 3, most: int = 15) -> dict:
    """One problem of `count` numbers from 1 to `most`, and a target from 1 to 100 that these operators make of them.

    Raises ValueError where they hardly ever make one.
    """
    for _ in range(10_000):
        numbers = [rng.randint(1, most) for _ in range(count)]
        parts = [(Fraction(n), str(n)) for n in numbers]
        while len(parts) > 1:
            rng.shuffle(parts)
            (a, left), (b, right), *rest = parts
            op = rng.choice(operators)
            if op == "/" and not b:
                break
            made = a + b if op == "+" else a - b if op == "-" else a * b if op == "*" else a / b
            parts = [(made, f"({left}{op}{right})" if rest else f"{left}{op}{right}"), *rest]
        target, solution = parts[0]
        if len(parts) == 1 and target.denominator == 1 and 1 <= target <= 100:
            shown = " ".join(map(str, numbers))
            return {"prompt": f"{shown} make {target}: ", "answer": {"numbers": numbers, "target": int(target)},
                    "solution": solution if set(operators) - set("+-") else think(numbers, int(target))}
    raise ValueError("no target up to 100")


def tenth(one: dict) -> int:
    """Which tenth of all problems this one belongs to, 0 to 9, whatever the order of its numbers."""
    return zlib.crc32(f"{sorted(one['answer']['numbers'])} {one['answer']['target']}".encode()) % 10


def signed(numbers: list[int], minus: tuple[int, ...]) -> str:
    """Such as 14+8-5, of 14 5 8, where minus is 0 1 0."""
    return "+".join(str(n) for n, m in zip(numbers, minus) if not m) + "".join(
        f"-{n}" for n in itertools.compress(numbers, minus))


def think(numbers: list[int], target: int) -> str:
    """The way to a sum with signs: what the sum of all is over the target, halved, is what has to be subtracted."""
    text, total = f"hm {numbers[0]}", numbers[0]
    for n in numbers[1:]:
        total += n
        text += f"+{n}={total}"
    over = (total - target) // 2
    splits = itertools.product((0, 1), repeat=len(numbers))
    minus = next(m for m in sorted(splits, key=sum) if sum(itertools.compress(numbers, m)) == over)
    return f"{text}-{target}={total - target}/2={over} <answer>{signed(numbers, minus)}"


def document(rng: random.Random, one: dict, guess: float) -> str:
    """An answer to pretrain on: random signs, as often as `guess` says, or else the right ones after some thought."""
    numbers = one["answer"]["numbers"]
    if rng.random() >= guess:
        return think(numbers, one["answer"]["target"])
    return signed(numbers, rng.choice([*itertools.product((0, 1), repeat=len(numbers))][:-1]))  # not all of them minus


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description="Write problems of Countdown as JSON lines.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # One line, without the usage.
    parser.add_argument("--out", type=Path, default=Path("countdown.jsonl"), help="a new file (countdown.jsonl)")
    parser.add_argument("--problems", type=int, default=10000, help="how many, 10 to 1000000, or all there are (10000)")
    parser.add_argument("--operators", default="+-", help='some of "+-*/" (+-)')
    parser.add_argument("--count", type=int, default=3, help="numbers of a problem, 2 to 6 (3)")
    parser.add_argument("--most", type=int, default=15, help="the largest number, 2 to 100 (15)")
    parser.add_argument("--held-out", type=int, default=0, help="which tenth is held out, 0 to 9 (0); 1 is for tuning")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not (10 <= args.problems <= 10**6 and 2 <= args.count <= 6 and 2 <= args.most <= 100 and 0 <= args.held_out < 10
            and args.operators and set(args.operators) <= set("+-*/")):
        parser.error("give 10 to 1000000 --problems, --count 2 to 6, --most 2 to 100, --held-out 0 to 9, "
                     '--operators of "+-*/"')
    rng, found, some = random.Random(args.seed), ({}, {}), args.problems // 10  # to train on, and held out
    with contextlib.suppress(ValueError):
        for _ in range(20 * args.problems):
            if len(found[0]) < args.problems - some or len(found[1]) < some:
                one = problem(rng, args.operators, args.count, args.most)
                found[tenth(one) == args.held_out][one["prompt"]] = one
    held = min(len(found[1]), len(found[0]) // 9, some)
    chosen = [*itertools.islice(found[0].values(), 9 * held), *itertools.islice(found[1].values(), held)]
    if not held:
        parser.error("so few problems are there: give other --operators, --count or --most")
    try:
        with open(args.out, "x", encoding="utf-8") as f:
            f.writelines(json.dumps(one) + "\n" for one in chosen)
    except OSError as error:
        parser.error(f"cannot write {args.out} ({error.strerror}): give a new file with --out")
    print(f"{args.out}: {len(chosen)} problems, {held} of them held out, such as {chosen[0]}")


if __name__ == "__main__":
    main()
