"""Records for trying tasks, from what every machine has: the interpreter's own library, and numbers. Nothing is downloaded.

    python tools/records_python.py --output records

records/classification   a docstring, and the package that it stands in
records/questions        the head of a function, made of the library's arguments, and a default value in it that is asked for
records/summaries        the body of a docstring, and its first line
records/translation      a number in English words and in Chinese characters, which group it differently: 10,000 is one word
"""

import ast
import inspect
import json
import os
import random
from collections.abc import Iterator

from lm_jax import cli
from lm_jax.data import sources

PACKAGES = ("asyncio", "email", "multiprocessing", "tkinter", "turtle", "unittest")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SMALL = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
ONES = f"{SMALL} seventeen eighteen nineteen".split()
TENS = ". . twenty thirty forty fifty sixty seventy eighty ninety".split()
DIGITS, PLACES = "零一二三四五六七八九", ("", "十", "百", "千")


def english(number: int) -> str:
    """Below a million."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10] + (f"-{ONES[number % 10]}" if number % 10 else "")
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    rest = f" {english(number % size)}" if number % size else ""
    return f"{english(number // size)} {name}{rest}"


def chinese(number: int) -> str:
    """Below a million; a zero is read once where places are left out."""
    if number >= 10_000:
        low = number % 10_000
        return chinese(number // 10_000) + "万" + (("零" if low < 1000 else "") + chinese(low) if low else "")
    digits, out, skipped = str(number), "", False
    for place, digit in zip(reversed(range(len(digits))), map(int, digits), strict=True):
        if digit:
            out += ("零" if skipped and out else "") + DIGITS[digit] + PLACES[place]
        skipped = not digit
    return out or DIGITS[0]


def of_library() -> Iterator[tuple[str, dict[str, str]]]:
    """(task, record) of every docstring, and 8,000 questions on arguments and default values of the library."""
    pairs: dict[tuple[str, str], None] = {}
    for name, data in sources.documents("python"):
        package, text = name.split("/")[0].removesuffix(".py"), sources.decode(data)
        if name.startswith("manual/") or text is None:
            continue
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, (*FUNCTIONS, ast.ClassDef)):
                continue
            documented = inspect.cleandoc(ast.get_docstring(node) or "")
            head, _, body = (part.strip() for part in documented.partition("\n\n"))
            if package in PACKAGES and len(documented) > 40:
                yield "classification", {"text": documented, "label": package}
            if len(body) > 100 and 15 < len(head) < 100 and "\n" not in head:
                yield "summaries", {"source": body, "target": head}
            if isinstance(node, FUNCTIONS):
                values = node.args.defaults
                named = (node.args.posonlyargs + node.args.args)[-len(values) :] if values else []
                pairs |= {(name.arg, ast.unparse(value)): None for name, value in zip(named, values, strict=True)}
    draw, short = random.Random(0), sorted(pair for pair in pairs if len(pair[1]) < 16)
    for _ in range(8000):
        head = draw.sample(short, 4)
        context = f"def f({', '.join(f'{name}={value}' for name, value in head)})"
        name, answer = draw.choice(head)
        if context.count(answer) == 1 and len({name for name, _ in head}) == 4:
            yield "questions", {"question": name, "context": context, "answer": answer}


def of_numbers() -> Iterator[tuple[str, dict[str, str]]]:
    """12,000 numbers, as many of each length."""
    draw = random.Random(0)
    for number in sorted({draw.randrange(10 ** draw.randint(1, 6)) for _ in range(20_000)})[-12_000:]:
        yield "translation", {"source": english(number), "target": chinese(number)}


def main(arguments: list[str]) -> int:
    parser = cli.Parser("tools/records_python.py", __doc__)
    parser.add_argument("--output", required=True, help="a folder; each task has one in it")
    flags = parser.parse_args(arguments)
    found: dict[str, dict[str, None]] = {}  # the same record once, in order
    for task, record in (*of_library(), *of_numbers()):
        found.setdefault(task, {})[json.dumps(record, ensure_ascii=False)] = None
    for task, lines in found.items():
        os.makedirs(os.path.join(flags.output, task), exist_ok=True)
        with open(os.path.join(flags.output, task, "train.jsonl"), "w") as out:
            out.write("\n".join(lines) + "\n")
        print(f"{len(lines):,} records in {flags.output}/{task}/train.jsonl")
    return 0


if __name__ == "__main__":
    cli.run_command(main)
