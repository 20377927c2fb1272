"""A sampled text as it grows, for those who read along."""

import codecs

from engine.tokenizer import Tokenizer


class Text:
    """One sample as it grows: whole characters only, and nothing from the text `stop` on."""

    def __init__(self, tokenizer: Tokenizer, stop: str | None):
        self.tokenizer = tokenizer
        self.stop = stop                                # None or '' where nothing ends it
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace')
        self.text = ''
        self.n_shown = 0                                # characters of the text
        self.ended = False

    def add(self, token: int, last: bool) -> None:
        """Append a sampled token. last: no more tokens follow."""
        if not self.ended:
            self.append(self.tokenizer.decode_bytes([token]), last)

    def finish(self) -> None:
        """No more tokens follow."""
        if not self.ended:
            self.append(b'', last=True)

    def append(self, data, last):
        """Append bytes of UTF-8, which may end within a character."""
        self.text += self.decoder.decode(data, final=last)
        self.ended = last
        if self.stop and self.stop in self.text:
            self.text = self.text[:self.text.index(self.stop)]
            self.ended = True

    def new_part(self) -> str:
        """What can be shown and was not yet: the end of the text is not, where it may turn out to
        begin `stop`."""
        end = len(self.text)
        if self.stop and not self.ended:
            end -= common_length(self.text, self.stop)
        part = self.text[self.n_shown:end]
        self.n_shown = end
        return part


def common_length(text: str, stop: str) -> int:
    """How many characters at the end of a text are those at the beginning of `stop`."""
    for length in range(len(stop) - 1, 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
