"""Answers to several readers, computed by one thread."""

import queue
import threading
from collections.abc import Iterator

from engine.chat.chat_model import AnswerSettings, ChatModel, Prompt
from engine.errors import RunError
from engine.generation.kv_cache import TextCache
from engine.log import log


class Answer:
    """An answer that is being computed, on its way from the thread of the model to a reader."""

    def __init__(self, prompt: Prompt, settings: AnswerSettings):
        self.prompt = prompt
        self.settings = settings
        self.is_cancelled = False
        self.parts: queue.SimpleQueue = queue.SimpleQueue()     # texts, then None or a RunError
        # used only by the thread that computes the answer
        self.steps: Iterator[str] | None = None
        self.text_cache: TextCache | None = None

    def cancel(self) -> None:
        """Stop the computing after the present token."""
        self.is_cancelled = True

    def new_text(self, seconds: float) -> str | None:
        """The text since the last call, after at most that many seconds; '' where there is none
        yet, and None at the end. Raises RunError where the answer failed."""
        texts = []
        try:
            part = self.parts.get(timeout=seconds)
            while True:
                if not isinstance(part, str):
                    break
                texts.append(part)
                part = self.parts.get_nowait()
        except queue.Empty:
            return ''.join(texts)

        if texts:
            self.parts.put(part)            # the end, for the next call
            return ''.join(texts)
        if part is not None:
            raise part
        return None


class AnswerQueue:
    """One thread computes all answers, each a token at a time, in turns.

    The caches of finished answers are kept, so that a conversation which goes on is not read again.
    Equal beginnings of ids alone decide which cache an answer gets.
    """

    def __init__(self, chat_model: ChatModel, max_answers: int):
        """max_answers: how many are computed at once, and how many caches are kept."""
        self.chat_model = chat_model
        self.max_answers = max_answers
        self.places = threading.BoundedSemaphore(max_answers)   # for answers that are under way
        self.waiting: queue.SimpleQueue = queue.SimpleQueue()   # Answers; None wakes the thread
        self.is_closed = False
        self.free: list[TextCache] = []                         # of finished answers, oldest first
        self.n_caches = 0                                       # free ones and those in use
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def submit(self, prompt: Prompt, settings: AnswerSettings) -> Answer | None:
        """An Answer that will be computed; None where max_answers are under way, or after close."""
        if self.is_closed or not self.places.acquire(blocking=False):
            return None
        answer = Answer(prompt, settings)
        self.waiting.put(answer)
        return answer

    def close(self) -> None:
        """End the thread, after its present token. Answers under way raise RunError."""
        self.is_closed = True
        self.waiting.put(None)
        self.thread.join()

    # In the thread of the model

    def run(self):
        while not self.is_closed:
            answer = self.waiting.get()
            if answer is not None and self.take_step(answer):
                self.waiting.put(answer)

        # answers that nobody computes any more
        while not self.waiting.empty():
            answer = self.waiting.get()
            if answer is not None:
                self.finish(answer, RunError('the server has ended'))

    def take_step(self, answer):
        """Compute a token of an answer. False at its end."""
        end = None
        try:
            if answer.steps is None:
                answer.text_cache = self.take_cache(answer.prompt.ids)
                answer.steps = self.chat_model.answer(answer.prompt, answer.settings,
                                                      answer.text_cache)
            if not answer.is_cancelled:
                answer.parts.put(next(answer.steps))
                return True
        except StopIteration:
            pass
        except Exception as error:              # such as a lack of memory
            end = RunError(f'the answer failed: {type(error).__name__}: {error!s:.300}')
            log.warning(str(end))
        self.finish(answer, end)
        return False

    def finish(self, answer, end):
        """end: None, or the RunError that ended the answer."""
        if answer.steps is not None:
            answer.steps.close()
        if answer.text_cache is not None:
            self.free.append(answer.text_cache)
        self.places.release()
        answer.parts.put(end)

    def take_cache(self, ids):
        """A cache for a prompt: one that holds a conversation which goes on here, or a new one, or
        the one that was used longest ago."""
        best = max(self.free, key=lambda cache: cache.common_length(ids), default=None)
        goes_on = best is not None and 2 * best.common_length(ids) >= len(best.ids)
        if not goes_on and self.n_caches < self.max_answers:
            cache = TextCache(self.chat_model.model)
            self.n_caches += 1
            return cache

        if not goes_on:
            best = self.free[0]
        self.free.remove(best)
        return best
