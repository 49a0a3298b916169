"""Countdown, make a target of some numbers by + - * and /: writes problems as JSON lines, and scores answers to them.

    python data/countdown.py --out countdown.jsonl
    python nano_eggroll.py --load model.npz --task countdown.jsonl --reward data/countdown.py:reward

Each problem can be solved, since its target is what came of its numbers, every one used once, in a random order. All
prompts differ. A `solution` goes along for the reader; training does not see it.
"""

import argparse
import ast
import json
import operator
import random
import re
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


def problem(rng: random.Random, count: int, most: int) -> dict:
    """One problem of `count` numbers from 1 to `most`, and a target from 1 to 100."""
    while True:
        numbers = [rng.randint(1, most) for _ in range(count)]
        parts = [(Fraction(n), str(n)) for n in numbers]
        while len(parts) > 1:
            rng.shuffle(parts)
            (a, left), (b, right), *rest = parts
            op = rng.choice("+-*/")
            made = a + b if op == "+" else a - b if op == "-" else a * b if op == "*" else a / b if b else Fraction(-1)
            parts = [(made, f"({left}{op}{right})" if rest else f"{left}{op}{right}"), *rest]
        target, solution = parts[0]
        if target.denominator == 1 and 1 <= target <= 100:
            shown = " ".join(map(str, numbers))
            return {"prompt": f"{shown} make {target}: ", "answer": {"numbers": numbers, "target": int(target)},
                    "solution": solution}


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description="Write problems of Countdown as JSON lines.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # One line, without the usage.
    parser.add_argument("--out", type=Path, default=Path("countdown.jsonl"), help="a new file (countdown.jsonl)")
    parser.add_argument("--problems", type=int, default=10000, help="how many, 1 to 1000000 (10000)")
    parser.add_argument("--count", type=int, default=3, help="numbers of a problem, 2 to 6 (3)")
    parser.add_argument("--most", type=int, default=20, help="the largest number, 2 to 100 (20)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not (1 <= args.problems <= 10**6 and 2 <= args.count <= 6 and 2 <= args.most <= 100):
        parser.error("give 1 to 1000000 --problems, --count 2 to 6, --most 2 to 100")
    rng, found = random.Random(args.seed), dict[str, dict]()
    for _ in range(20 * args.problems):
        if len(found) < args.problems:
            one = problem(rng, args.count, args.most)
            found[one["prompt"]] = one
    try:
        with open(args.out, "x", encoding="utf-8") as f:
            f.writelines(json.dumps(one) + "\n" for one in found.values())
    except OSError as error:
        parser.error(f"cannot write {args.out} ({error.strerror}): give a new file with --out")
    print(f"{args.out}: {len(found)} problems, such as {next(iter(found.values()))}")


if __name__ == "__main__":
    main()
