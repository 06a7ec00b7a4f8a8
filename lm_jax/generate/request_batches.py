"""Many requests in batches of one size, so that few programs serve all, with word of how far it is."""

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

Watch = Callable[[int, int], Any]  # (requests done, of how many)


class Batch(NamedTuple):
    """Requests that are asked together, by their indices."""

    requests: list[int]
    padded: list[int]  # the same, and the first again and again until there are as many as in every batch


def request_batches(
    order: Sequence[int],
    size: int,
    kind: Callable[[int], Hashable] = lambda request: None,
    watch: Watch = lambda done, of: None,
) -> Iterator[Batch]:
    """All requests in their order, `size` at a time; those of another `kind` than the one before begin a new batch.

    `watch` hears of a batch when the next one is asked for.
    """
    done = 0
    for _, group in itertools.groupby(order, kind):
        same = list(group)
        for first in range(0, len(same), size):
            requests = same[first : first + size]
            yield Batch(requests, requests + requests[:1] * (size - len(requests)))
            done += len(requests)
            watch(done, len(order))
