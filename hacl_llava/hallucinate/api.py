"""Candidates from a language model: what is asked, how its answers are taken, and the bill."""

import json
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

from ..common.endpoint import FAILED_IN_A_ROW, Endpoint, NotAnswered, read_reply
from ..config import HaclError
from . import Answer, Item
from .checks import Checker
from .choice import REFUSED, Work
from .prompts import FORMATS, Prompt, Settings


def _tokens(text: str) -> int:
    """About how many tokens a text is, at 4 bytes each."""
    return -(-len(text.encode("utf-8", "replace")) // 4)


def dollars(tokens: Mapping[str, int], price: Sequence[float]) -> float:
    """What {"input", "output"} tokens cost at ``price``, dollars per 10^6 tokens of each."""
    return sum(tokens.get(key, 0) * rate for key, rate in zip(("input", "output"), price)) / 1e6


def estimate(
    prompt: Prompt, items: int, caption_characters: int, wanted: int, price: Sequence[float] | None = None
) -> dict[str, Any]:
    """What a run may take: {"input", "output"} in tokens and {"dollars"}, None without ``price`` ($ per 10^6 tokens).

    ``items``: captions to rewrite, ``caption_characters``: of all of them, ``wanted``: hallucinated captions over all.
    An estimate: 4 characters a token, and nothing asked twice.
    """
    length, each = caption_characters / max(items, 1), round(wanted / max(items, 1))
    sample = Item(0, "", "x" * round(length), wanted=("existence",) * max(each, 1))
    request = json.dumps([prompt.messages(sample), FORMATS["schema"]])
    tokens = {"input": items * _tokens(request), "output": round(wanted * (20 + length / 4))}
    return {**tokens, "dollars": price and dollars(tokens, price)}


class Asking:
    """What is asked, and what is made of an answer, whether it travels by HTTP or in a file: request bodies, the
    reading of completions, the bill.

    Args:
        model: its name. checker: refuses candidates. settings: of the prompt file. spent: {"input", "output"} tokens of
            earlier starts, which count against ``settings.max_cost``. seed: of the run, sent with each request as a
            number of its own (None: none is sent).
    """

    whole_blocks = False

    def __init__(
        self,
        model: str,
        checker: Checker,
        settings: Settings | None = None,
        spent: Mapping[str, int] | None = None,
        seed: int | None = None,
    ) -> None:
        self.model, self.checker, self.settings = model, checker, settings or Settings()
        self.prompt = Prompt(self.settings.prompt, self.settings.examples)
        self.price, self.seed, self.spent = self.settings.price, seed, Counter(spent or {})
        self.stopped = None
        self._flying = Counter()  # tokens set aside for requests under way
        self._sample, self._thinks = "", False  # an answer that could not be read; see `common.endpoint.read_reply`

    def body(self, work: Work) -> dict[str, Any]:
        """The request's body: messages, settings, form of the answer."""
        item = work.item._replace(wanted=work.missing())
        body = {"messages": self.prompt.messages(item, work.refused + [t for _, t in work.got])}
        body |= {"temperature": self.settings.temperature, "max_tokens": self._limit(work)}
        if response_format := FORMATS[self.settings.response_format]:
            body["response_format"] = response_format
        if self.seed is not None:
            body["seed"] = (self.seed * 1_000_003 + work.item.index * 101 + work.attempt) % 2**31
        return body

    def _limit(self, work):
        """Tokens of output allowed: a token a byte, far more than needed; four times as many after each cut answer."""
        if self.settings.max_output_tokens:
            return self.settings.max_output_tokens
        caption = len(work.item.caption.encode("utf-8", "replace"))
        return (64 + len(work.missing()) * (32 + caption)) * 4**work.cut

    # ---- the bill

    def reserve(self, work: Work) -> bool:
        """Sets tokens aside for the next request of ``work``; False if it might pass the cap."""
        text = json.dumps(self.body(work), ensure_ascii=False)
        need = Counter(input=_tokens(text), output=self._limit(work))
        total = self.spent + self._flying + need
        if self.settings.max_cost is not None and dollars(total, self.price) > self.settings.max_cost:
            return False
        work.reserved = need
        self._flying += need
        return True

    def release(self, work: Work) -> None:
        """Takes back what is set aside for a request that has ended."""
        self._flying -= work.reserved
        work.reserved = Counter()

    def sentence(self) -> str:
        """The sentence for ``stopped``."""
        return (
            f"stopped by the spending cap: ${dollars(self.spent, self.price):.4f} of ${self.settings.max_cost} is "
            f"spent ({self.spent['input']} tokens of input, {self.spent['output']} of output) and one more request "
            "might pass it; to go on, run again with a higher max_cost."
        )

    # ---- responses

    def take(self, work: Work, response: Mapping[str, Any]) -> bool:
        """Takes what a chat completion (decoded JSON) holds for ``work``; True if there is nothing left to ask."""
        reply = read_reply(response, self._thinks)
        self._thinks |= reply.thinks
        try:
            usage = response["usage"]
            usage = Counter(input=int(usage["prompt_tokens"]), output=int(usage["completion_tokens"]))
        except (KeyError, TypeError, ValueError):  # not reported: about what it must have been
            usage = Counter(input=work.reserved["input"], output=_tokens(reply.text))
        work.usage.update(usage)
        self.spent.update(usage)
        work.attempt += 1
        if reply.refused:
            work.reason = REFUSED
            return True
        if work.read(reply.text, self.checker):
            return True
        self._sample = reply.text if work.unread else self._sample
        if work.unread and reply.cut:
            work.reason += f" (the answer stopped at {self._limit(work)} tokens; max_output_tokens allows more)"
            work.cut += 1
        return not work.lacks() or work.attempt >= self.settings.attempts


class ApiSource(Asking):
    """Asks an OpenAI-compatible endpoint, some requests at a time.

    Args:
        endpoint: where. The others: as of `Asking`.
    """

    def __init__(self, endpoint: Endpoint, checker: Checker, **more: Any) -> None:
        super().__init__(endpoint.model, checker, **more)
        self.endpoint = endpoint
        endpoint.known = bool(self.spent)

    def answers(self, items: Iterable[Item]) -> Iterator[Answer]:
        """Yields an `Answer` for each of ``items``, which are taken as needed; of those that a spending cap leaves out,
        none, and ``stopped`` says so.

        Raises:
            HaclError: the endpoint does not work, or nobody can read what it answers. Requests under way are finished
                and their answers yielded before; what was paid without an answer is yielded as failed.
        """
        again, under_way, unread = deque(), {}, 0  # answers that did not do; {record: work}; of those, in a row
        self.stopped = broken = None

        def todo():
            fresh, work = map(Work, items), None
            while broken is None:
                work = work or (again.popleft() if again else next(fresh, None))
                if work is None and not under_way:
                    return
                if work is not None and self.reserve(work):
                    under_way[work.item.index] = work
                    yield work
                    work = None
                elif under_way:
                    yield None  # one of them may have to be asked again, or turn out cheaper than what is set aside
                else:
                    self.stopped = self.sentence()
                    again.append(work)
                    return

        try:
            with closing(self.endpoint.each(lambda work: self.endpoint.complete(self.body(work)), todo())) as replies:
                for work, response in replies:
                    try:
                        answer = self._answer(work, response)
                    except Exception as error:  # of a checker, say: nothing that is paid is lost by it
                        broken = broken or error
                        self.endpoint.stop()
                        continue
                    finally:
                        self.release(work)
                        del under_way[work.item.index]
                    if answer is None:
                        again.append(work)
                        continue
                    yield answer
                    if not answer.failed:
                        useless = not answer.captions and (answer.reason or "").startswith("no usable answer")
                        unread = unread + 1 if useless else 0
                    if unread >= FAILED_IN_A_ROW:
                        broken = broken or self._nobody_can_read(unread)
        except Exception as error:
            broken = broken or error
        reason = "the spending cap is reached" if self.stopped else "the run ended early"
        for work in (*again, *under_way.values()):
            if work.usage:
                answer = work.answer(reason, failed=True)
                yield answer if self.stopped else answer._replace(captions=(), reason=reason, failed=True)
        if broken is not None:
            raise broken

    def _answer(self, work, response):
        """What came of a request, or None where the item is to be asked for again."""
        if isinstance(response, NotAnswered):
            return work.answer(REFUSED) if response.refused else work.answer(f"endpoint: {response}", failed=True)
        return work.answer() if self.take(work, response) else None

    def _nobody_can_read(self, count):
        return HaclError(
            f"{self.endpoint.url}: {count} records in a row got no usable answer, the last was "
            f"{self.endpoint.clean(self._sample)!r}; see to the model, the prompt file or its response_format."
        )
