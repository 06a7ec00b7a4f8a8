"""What a model that writes texts has to beat: baselines that know nothing of language (`tools/text_baselines.py`)."""

import collections
import re
from collections.abc import Callable

WORD = re.compile(r"[\u2e80-\uffff]|\w+|[^\w\s]")  # of a script without spaces, a character
ROUNDS = 5  # of expectation and maximisation


def text_baselines(pairs: list[tuple[str, str]]) -> dict[str, Callable[[str], str]]:
    """{name: source -> target}, learnt from the (source, target) pairs of the training records.

    `lead`: the first words of the source, as many as targets have on average. `copy`: the source as it is. `frequent`: the
    most frequent target. `dictionary`: word by word the likeliest word of the targets, the word itself where it is unknown,
    and the whole target of a source that was trained on.
    """
    size = round(sum(len(target.split()) for _, target in pairs) / len(pairs))
    [(most, _)] = collections.Counter(target for _, target in pairs).most_common(1)
    known, words = dict(pairs), dictionary(pairs)
    by_words = lambda source: re.sub(WORD, lambda word: words.get(word[0].lower(), word[0]), source)
    return {
        "lead": lambda source: " ".join(source.split()[:size]),
        "copy": lambda source: source,
        "frequent": lambda source: most,
        "dictionary": lambda source: known.get(source) or by_words(source),
    }


def dictionary(pairs: list[tuple[str, str]]) -> dict[str, str]:
    """The likeliest word of the target for each word of the source (IBM model 1, aclanthology.org/J93-2003).

    Rare pairs and long texts are left out.
    """
    found = [(WORD.findall(a.lower()), WORD.findall(b)) for a, b in pairs]
    texts = [(set(a), set(b)) for a, b in found if len(a) <= 40 and len(b) <= 40]
    share: dict[tuple[str, str], float] = {}
    for _ in range(ROUNDS):
        count: dict[tuple[str, str], float] = collections.defaultdict(float)
        for ours, theirs in texts:
            for b in theirs:
                weights = {a: share.get((a, b), 1e-6 if share else 1.0) for a in ours}
                total = sum(weights.values())
                for a, weight in weights.items():
                    count[a, b] += weight / total
        whole: dict[str, float] = collections.defaultdict(float)
        for (a, _), number in count.items():
            whole[a] += number
        share = {(a, b): number / whole[a] for (a, b), number in count.items() if number > 0.01}
    best: dict[str, tuple[float, str]] = {}
    for (a, b), value in share.items():
        best[a] = max(best.get(a, (0.0, "")), (value, b))
    return {a: b for a, (_, b) in best.items()}
