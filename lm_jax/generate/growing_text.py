"""The text of tokens as they come one by one, up to a stop string."""

from collections.abc import Iterable

from lm_jax.data.tokenizer import Tokenizer, continuation

BEFORE = 8  # tokens before a new one that its text may depend on


class GrowingText:
    """The text that tokens add to a prompt. What may be the start of a stop string, or half a character, waits."""

    def __init__(self, tokenizer: Tokenizer, before: Iterable[int], stops: tuple[str, ...] = ()):
        self.tokenizer, self.stops = tokenizer, stops
        self.window = [*map(int, before)][-BEFORE:]
        self.known = len(self.window)  # tokens whose text is out
        self.text, self.shown, self.stopped = "", 0, False

    def add(self, token: int) -> None:
        """A token has come."""
        self.window.append(token)
        self._grow(half=False)

    def end(self) -> None:
        """No token follows: half a character stays half."""
        self._grow(half=True)

    def _grow(self, half: bool) -> None:
        new = continuation(self.tokenizer, self.window[: self.known], self.window[self.known :])
        if self.stopped or (new.endswith("\ufffd") and not half):
            return
        self.text += new
        self.window = self.window[-BEFORE:]
        self.known = len(self.window)
        if found := [place for place in map(self.text.find, self.stops) if place >= 0]:
            self.text, self.stopped = self.text[: min(found)], True

    def take(self, everything: bool = False) -> str:
        """What is new since the last call; `everything`: nothing waits for what may follow."""
        starts = [stop[:k] for stop in self.stops for k in range(1, len(stop))]
        waits = 0 if everything or self.stopped else max((len(x) for x in starts if self.text.endswith(x)), default=0)
        new = self.text[self.shown : max(self.shown, len(self.text) - waits)]
        self.shown += len(new)
        return new
