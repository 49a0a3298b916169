"""GSM8K, word problems of primary school: turns its own lines into problems, and scores answers to them.

    curl -O https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/train.jsonl
    python data/gsm8k.py train.jsonl --out gsm8k.jsonl
    python nano_eggroll.py --load model.npz --task gsm8k.jsonl --reward data/gsm8k.py:reward --length 256

Of {"question": "...", "answer": "... #### 72"} the number after #### is the answer; the way there is left out.
"""

import argparse
import json
import re
from pathlib import Path


def reward(prompt: str, completion: str, answer: str) -> float:
    """1 if the last number of the completion equals the answer; what it goes on to ask itself does not count."""
    given, right = numbers(completion.partition("\nQuestion:")[0]), numbers(str(answer))
    return float(bool(given and right) and given[-1] == right[-1])


def numbers(text: str) -> list[float]:
    """All numbers of a text, such as -1,234.50; of 10-5 the last one is 5."""
    return [float(n.replace(",", "")) for n in re.findall(r"(?:(?<![\w)])-)?\d[\d,]*(?:\.\d+)?", text)]


def problem(line: str) -> dict[str, str]:
    """The problem of one of GSM8K's lines; raises ValueError if it is none."""
    match json.loads(line):
        case {"question": str(question), "answer": str(text)} if len(numbers(text.partition("####")[2])) == 1:
            answer = text.partition("####")[2].strip().replace(",", "")
            return {"prompt": f"Question: {question.strip()}\nAnswer:", "answer": answer}
    raise ValueError("no question, or no number after ####")


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description="Turn GSM8K's lines into problems for nano_eggroll.py --task.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # One line, without the usage.
    parser.add_argument("file", type=Path, help="train.jsonl or test.jsonl of GSM8K")
    parser.add_argument("--out", type=Path, default=Path("gsm8k.jsonl"), help="a new file (gsm8k.jsonl)")
    args = parser.parse_args()
    problems, at = [], 1
    try:
        for at, line in enumerate(args.file.read_text("utf-8-sig").split("\n"), 1):
            if line.strip():
                problems.append(problem(line))
    except OSError as error:
        parser.error(f"cannot read {args.file} ({error.strerror}): give GSM8K's train.jsonl")
    except (ValueError, RecursionError) as error:
        parser.error(f"{args.file}, line {at}, is none of GSM8K's ({error}): give lines like "
                     '{"question": "...", "answer": "... #### 72"}')
    if not problems:
        parser.error(f"{args.file} is empty: give GSM8K's train.jsonl")
    try:
        with open(args.out, "x", encoding="utf-8") as f:
            f.writelines(json.dumps(one) + "\n" for one in problems)
    except OSError as error:
        parser.error(f"cannot write {args.out} ({error.strerror}): give a new file with --out")
    print(f"{args.out}: {len(problems)} problems, such as {problems[0]}")


if __name__ == "__main__":
    main()
