"""Records for trying four tasks, from what every machine has: the interpreter's own library, and numbers.

`tools/records_python.py` writes them and describes each task.
"""

import ast
import inspect
import random
from collections.abc import Iterator

from lm_jax.data import sources

PACKAGES = ("asyncio", "email", "multiprocessing", "tkinter", "turtle", "unittest")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SMALL = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
ONES = f"{SMALL} seventeen eighteen nineteen".split()
TENS = ". . twenty thirty forty fifty sixty seventy eighty ninety".split()
DIGITS, POWERS = "零一二三四五六七八九", ("", "十", "百", "千")


def english(number: int) -> str:
    """A number below a million in English words."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10] + (f"-{ONES[number % 10]}" if number % 10 else "")
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    rest = f" {english(number % size)}" if number % size else ""
    return f"{english(number // size)} {name}{rest}"


def chinese(number: int) -> str:
    """A number below a million in Chinese characters; a zero is read once where powers of ten are left out."""
    if number >= 10_000:
        low = number % 10_000
        return chinese(number // 10_000) + "万" + (("零" if low < 1000 else "") + chinese(low) if low else "")
    digits, out, skipped = str(number), "", False
    for power, digit in zip(reversed(range(len(digits))), map(int, digits), strict=True):
        if digit:
            out += ("零" if skipped and out else "") + DIGITS[digit] + POWERS[power]
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
        arguments = draw.sample(short, 4)
        context = f"def f({', '.join(f'{name}={value}' for name, value in arguments)})"
        name, answer = draw.choice(arguments)
        if context.count(answer) == 1 and len({name for name, _ in arguments}) == 4:
            yield "questions", {"question": name, "context": context, "answer": answer}


def of_numbers() -> Iterator[tuple[str, dict[str, str]]]:
    """(task, record) of 12,000 numbers, as many of each length."""
    draw = random.Random(0)
    for number in sorted({draw.randrange(10 ** draw.randint(1, 6)) for _ in range(20_000)})[-12_000:]:
        yield "translation", {"source": english(number), "target": chinese(number)}
