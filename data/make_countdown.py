"""Write problems of Countdown, as JSON lines for nano_eggroll.py --task: make a target of some numbers by + - * and /.

    python data/make_countdown.py --out countdown.jsonl
    python nano_eggroll.py --load model.npz --task countdown.jsonl --reward countdown

Each problem can be solved, since its target is what came of its numbers, every one used once, in a random order. All
problems differ. A `solution` goes along for the reader; training does not see it.
"""

import argparse
import json
import random
import sys
from fractions import Fraction
from pathlib import Path


def problem(rng: random.Random, count: int, most: int) -> dict:
    """One problem of `count` numbers from 1 to `most`, and a target from 1 to 100."""
    while True:
        numbers = [rng.randint(1, most) for _ in range(count)]
        parts = [(Fraction(n), str(n)) for n in numbers]
        while len(parts) > 1:
            rng.shuffle(parts)
            (a, left), (b, right), *rest = parts
            op = rng.choice("+-*/")
            value = a + b if op == "+" else a - b if op == "-" else a * b if op == "*" else a / b if b else Fraction(-1)
            parts = [(value, f"({left}{op}{right})" if rest else f"{left}{op}{right}"), *rest]
        target, solution = parts[0]
        if target.denominator == 1 and 1 <= target <= 100:
            shown = " ".join(map(str, numbers))
            return {"prompt": f"{shown} make {target}: ", "answer": {"numbers": numbers, "target": int(target)},
                    "solution": solution}


def main() -> int:
    """Write the file; returns the exit code."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    p.add_argument("--out", type=Path, default=Path("countdown.jsonl"))
    p.add_argument("--problems", type=int, default=10000)
    p.add_argument("--count", type=int, default=3, help="numbers of a problem, 2 to 6 (3)")
    p.add_argument("--most", type=int, default=20, help="the largest number, 2 to 100 (20)")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    if not (1 <= a.problems <= 10**6 and 2 <= a.count <= 6 and 2 <= a.most <= 100):
        print("make_countdown: give 1 to 10^6 --problems, --count 2 to 6, --most 2 to 100", file=sys.stderr)
        return 2
    rng, found = random.Random(a.seed), dict[str, dict]()
    for _ in range(20 * a.problems):
        if len(found) < a.problems:
            one = problem(rng, a.count, a.most)
            found[one["prompt"]] = one
    try:
        with open(a.out, "x") as f:
            f.writelines(json.dumps(one) + "\n" for one in found.values())
    except OSError as e:
        print(f"make_countdown: cannot write {a.out} ({e.strerror}): give a new file with --out", file=sys.stderr)
        return 2
    print(f"{a.out}: {len(found)} problems, such as {next(iter(found.values()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
