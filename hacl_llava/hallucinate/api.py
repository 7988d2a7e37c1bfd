"""Hallucinated captions from an OpenAI-compatible endpoint, request by request."""

import asyncio
import email.utils
import json
import os
import random
import re
import sys
import time
from collections import Counter
from typing import NamedTuple
from urllib.parse import urlsplit

from ..config import HaclError
from . import Item
from .prompts import REFUSED, SCHEMA, Prompt, Work

OPENAI_URL = "https://api.openai.com/v1"
FORMATS = {
    "schema": {"type": "json_schema", "json_schema": {"name": "captions", "strict": True, "schema": SCHEMA}},
    "json": {"type": "json_object"},
    "text": None,
}
POLICY = re.compile(r"content.?filter|content.?(management.)?policy|usage polic|ResponsibleAI|flagged", re.I)
FORMAT = re.compile(r"response.?format|json.?(schema|object)|structured.?output", re.I)
BACKOFF = 1.0  # seconds before the first retry; each next waits twice as long, so that six outlast a limit per minute
LONGEST_WAIT = 600  # seconds; an endpoint that asks for a longer pause ends the run
FAILED_IN_A_ROW = 25


def _openai():
    try:
        import openai
    except ImportError:
        raise ImportError("Asking an endpoint needs the package openai: pip install 'hacl_llava[api]'") from None
    return openai


def _tokens(text):
    """About how many tokens a text is, at 4 bytes each."""
    return -(-len(text.encode("utf-8", "replace")) // 4)


def dollars(tokens, price):
    """What {"input", "output"} tokens cost at ``price``, dollars per 10^6 tokens of each."""
    return sum(tokens.get(key, 0) * rate for key, rate in zip(("input", "output"), price)) / 1e6


def estimate(prompt, items, caption_characters, wanted, price=None):
    """What a run may take: {"input", "output"} in tokens and {"dollars"}, None without ``price`` ($ per 10^6 tokens).

    ``items``: captions to rewrite, ``caption_characters``: of all of them, ``wanted``: hallucinated captions over all.
    An estimate: 4 characters a token, and nothing asked twice.
    """
    length, each = caption_characters / max(items, 1), round(wanted / max(items, 1))
    sample = Item(0, "", "x" * round(length), wanted=("existence",) * max(each, 1))
    request = json.dumps([prompt.messages(sample), FORMATS["schema"]])
    tokens = {"input": items * _tokens(request), "output": round(wanted * (20 + length / 4))}
    return {**tokens, "dollars": price and dollars(tokens, price)}


class _Trouble(NamedTuple):
    """Why a request came to nothing. ``wait``: seconds the endpoint asks for. ``fatal``: the message to end with."""

    reason: str
    retry: bool = False
    wait: float = 0.0
    fatal: str | None = None
    refused: bool = False
    unreachable: bool = False
    detail: str = ""  # all that the endpoint says about a request it does not accept


class Connection:
    """An OpenAI-compatible endpoint's address and key, checked, and what its errors mean.

    Args:
        model: its name at the endpoint. base_url: OpenAI's, or that of ``OPENAI_BASE_URL``, if None. key_env: the
            environment variable that holds the key. timeout: seconds for one request.

    Raises:
        HaclError: no address, or no key where one is needed. ImportError: the package openai is not installed.
    """

    def __init__(self, model, base_url=None, key_env="OPENAI_API_KEY", timeout=60):
        _openai()
        self.model, self.timeout = model, timeout
        self.url = base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
        try:
            parts = urlsplit(self.url)
            right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            right = False
        if not right or "@" in parts.netloc or parts.query:
            raise HaclError(
                "base_url must be http(s)://host[:port]/path, without user name, password or query; a key belongs into "
                f"the environment variable {key_env}."
            )
        self._key_env, self._key = key_env, os.environ.get(key_env, "").strip()
        if not self._key and self.url == OPENAI_URL:
            raise HaclError(
                f"no key: the environment variable {key_env} is not set; set it to your key, or give base_url for "
                "an endpoint that needs none."
            )
        if not re.fullmatch(r"[!-~]*", self._key):
            raise HaclError(f"the key in {key_env} holds spaces or characters that no key has; set it again.")

    def _client(self, cls, **more):
        openai = _openai()
        return getattr(openai, cls)(api_key=self._key or "none", base_url=self.url, **more)

    def _clean(self, text, length=300):
        """A foreign text fit for a message: on one line, without the key, cut to a length."""
        text = " ".join(str(text).split())
        text = text.replace(self._key, "***") if self._key else text
        return text if len(text) <= length else text[:length] + "..."

    def _trouble(self, error):
        """What an exception of the client means."""
        openai = _openai()
        if isinstance(error, openai.APITimeoutError | TimeoutError | asyncio.TimeoutError):
            unreachable = type(error.__cause__).__name__ == "ConnectTimeout"
            return _Trouble(f"no answer within {self.timeout} s", retry=True, unreachable=unreachable)
        if not isinstance(error, openai.APIStatusError):
            cause = error.__cause__ or error
            # Whatever breaks once a connection stands (Read..., RemoteProtocol...) says that somebody is there.
            unreachable = type(cause).__name__.startswith(("Connect", "Proxy", "Unsupported"))
            why = f"{type(cause).__name__}: {self._clean(cause)}"
            return _Trouble(f"no connection ({why})", retry=True, unreachable=unreachable)
        status, body = error.status_code, error.body
        body = body if isinstance(body, dict) else {"message": body}
        text = f"{status}: {self._clean(body.get('message') or body)}"
        codes = self._clean(json.dumps(body, default=str), 5000)
        trouble = _Trouble(text, detail=codes if status in (400, 422) else "")
        if status == 402 or "insufficient_quota" in codes:
            return trouble._replace(fatal=f"{self.url}: no credit is left ({text}); add some, then run again to go on.")
        if status in (400, 403, 422) and POLICY.search(codes):
            return trouble._replace(refused=True)
        if status in (401, 403):
            key = f"check the environment variable {self._key_env}" if self._key else f"set {self._key_env} to a key"
            return trouble._replace(fatal=f"{self.url} refuses the key ({text}); {key}.")
        if status in (404, 405):
            return trouble._replace(
                fatal=f"{self.url} does not know the model {self.model!r}, or is not the right address ({text}); check "
                "model and base_url (which mostly ends in /v1)."
            )
        if status in (408, 409, 425, 429) or status >= 500:
            wait = _retry_after(error.response.headers)
            if wait > LONGEST_WAIT:
                return trouble._replace(
                    fatal=f"{self.url} asks to wait for {wait:.0f} s ({text}); run again after that to go on."
                )
            return trouble._replace(retry=True, wait=wait)
        return trouble


class Asking:
    """What is asked, and what is made of an answer, whether it travels by HTTP or in a file: settings, request bodies,
    the reading of completions, the bill. The settings are those of `ApiSource`."""

    whole_blocks, _sample = False, ""

    def __init__(
        self, *, model, checker, prompt=None, temperature=1.0, max_output_tokens=None, attempts=3,
        response_format="schema", limit="max_tokens", price=None, max_cost=None, spent=None, seed=None,
    ):  # fmt: skip
        self.model, self.checker, self.prompt = model, checker, prompt or Prompt()
        self.temperature, self.max_output_tokens, self.seed = temperature, max_output_tokens, seed
        self.attempts, self.price, self.max_cost = attempts, price, max_cost
        self.spent = Counter(spent or {})
        self.stopped = None
        if response_format not in FORMATS:
            raise HaclError(f"response_format is {response_format!r}, allowed is one of {', '.join(FORMATS)}.")
        if attempts < 1:
            raise HaclError(f"attempts is {attempts}; allowed is 1 and more.")
        if max_cost is not None and not price:
            raise HaclError(
                f"max_cost is {max_cost}, but without a price nothing can be counted against it; give price too, the "
                "dollars per million tokens of input and of output."
            )
        self._form = (response_format, limit)
        self._flying = Counter()  # tokens set aside for requests under way

    def body(self, work):
        """The request's body: messages, settings, form of the answer."""
        response_format, limit = FORMATS[self._form[0]], self._form[1]
        item = work.item._replace(wanted=work.missing())
        body = {"model": self.model, "messages": self.prompt.messages(item, work.refused + [t for _, t in work.got])}
        body |= {"temperature": self.temperature, limit: self._limit(work)}
        if response_format:
            body["response_format"] = response_format
        if self.seed is not None:
            body["seed"] = (self.seed * 1_000_003 + work.item.index * 101 + work.attempt) % 2**31
        return body

    def _limit(self, work):
        """Tokens of output allowed: a token a byte, far more than needed; four times as many after each cut answer."""
        if self.max_output_tokens:
            return self.max_output_tokens
        caption = len(work.item.caption.encode("utf-8", "replace"))
        return (64 + len(work.missing()) * (32 + caption)) * 4**work.cut

    # ---- the bill

    def reserve(self, work):
        """Sets tokens aside for the next request of ``work``; False if it might pass the cap."""
        text = json.dumps(self.body(work), ensure_ascii=False)
        need = Counter(input=_tokens(text), output=self._limit(work))
        total = self.spent + self._flying + need
        if self.max_cost is not None and dollars(total, self.price) > self.max_cost:
            return False
        work.reserved = need
        self._flying += need
        return True

    def release(self, work):
        self._flying -= work.reserved
        work.reserved = Counter()

    def sentence(self):
        """The sentence for ``stopped``."""
        return (
            f"stopped by the spending cap: ${dollars(self.spent, self.price):.4f} of ${self.max_cost} is spent "
            f"({self.spent['input']} tokens of input, {self.spent['output']} of output) and one more request might "
            "pass it; to go on, run again with a higher max_cost."
        )

    # ---- responses

    def take(self, work, response):
        """Takes what a chat completion (its JSON) holds for ``work``; True if there is nothing left to ask."""
        choice = response["choices"][0] if response["choices"] else None
        choice = choice if isinstance(choice, dict) else {}
        message = choice.get("message") if isinstance(choice.get("message"), dict) else {}
        text = message.get("content")
        if isinstance(text, list):  # of parts
            text = "".join(str(part.get("text", "")) for part in text if isinstance(part, dict))
        text = text if isinstance(text, str) else ""
        try:
            usage = response["usage"]
            usage = Counter(input=int(usage["prompt_tokens"]), output=int(usage["completion_tokens"]))
        except (KeyError, TypeError, ValueError):  # not reported: about what it must have been
            usage = Counter(input=work.reserved["input"], output=_tokens(text))
        work.usage.update(usage)
        self.spent.update(usage)
        work.attempt += 1
        finish = choice.get("finish_reason")
        if message.get("refusal") or finish == "content_filter":
            work.reason = REFUSED
            return True
        if work.read(text, self.checker):
            return True
        self._sample = text if work.unread else self._sample
        if work.unread and finish == "length":
            work.reason += f" (the answer stopped at {self._limit(work)} tokens; max_output_tokens allows more)"
            work.cut += 1
        return not work.missing() or work.attempt >= self.attempts


def _retry_after(headers):
    """Seconds that the endpoint asks to wait for, 0 if it does not say."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            return max(0.0, min(float(headers[name]) / unit, 1e9))
        except (KeyError, ValueError):
            pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    except (KeyError, TypeError, ValueError):
        return 0.0


def is_completion(response):
    return isinstance(response, dict) and isinstance(response.get("choices"), list)


class ApiSource(Asking, Connection):
    """Asks ``model`` at an OpenAI-compatible endpoint, some requests at a time.

    ``checker``: a `Checker`. ``prompt``: a `Prompt` (the paper's if None). ``base_url``: OpenAI's if None. ``key_env``:
    the environment variable that holds the key. ``max_output_tokens``: of one answer (None: by the caption's length).
    ``timeout``: seconds for one request. ``retries``: after 429, 5xx, a time-out or a lost connection. ``attempts``:
    answers asked for until enough captions pass the checks. ``response_format``: "schema", "json" or "text"; what the
    endpoint does not take is left for the next. ``concurrency``: requests in flight at most. ``requests_per_minute``:
    sent at most. ``price``: dollars per million tokens, (input, output). ``max_cost``: dollars, not to be passed; what
    a request that timed out may have cost is not known and not counted. ``spent``: {"input", "output"} tokens of
    earlier runs, ``seed``: of the run, sent with each request as a number of its own.

    Raises:
        HaclError: a setting that is not allowed; from ``answers`` what cannot get better by asking again.
        ImportError: the package openai is not installed.
    """

    def __init__(
        self, *, model, base_url=None, key_env="OPENAI_API_KEY", timeout=60, retries=6, concurrency=16,
        requests_per_minute=None, **settings,
    ):  # fmt: skip
        Asking.__init__(self, model=model, **settings)
        if retries < 0 or timeout <= 0:
            raise HaclError(
                f"retries is {retries}, timeout {timeout}; allowed is retries >= 0 and a timeout above 0 seconds."
            )
        if concurrency < 1 or (requests_per_minute is not None and requests_per_minute <= 0):
            raise HaclError(
                f"concurrency is {concurrency}, requests_per_minute {requests_per_minute}; allowed is a concurrency "
                ">= 1 and more than 0 requests per minute (or None)."
            )
        Connection.__init__(self, model, base_url, key_env, timeout)
        self.retries, self._alive = retries, False  # whether a completion has come back
        self.concurrency, self._interval = concurrency, 60 / (requests_per_minute or float("inf"))
        self._turn = 0.0  # loop time at which the next request may start
        self._fatal, self._unread = None, 0

    def answers(self, items):
        """Yields an `Answer` for each of ``items``, which are taken as needed.

        Requests in flight when something fatal happens are finished and their answers yielded before it is raised.
        """
        items, work, tasks = iter(items), None, set()
        self._fatal = last = self.stopped = None
        self._turn, self._row, self._capped = 0.0, 0, False
        self._halt = asyncio.Event()
        loop = asyncio.new_event_loop()
        # The retries are this class's own: the client's wait a minute or two at most, ask an account without credit
        # again, and are not paced. Its time-outs are per read, so that a response in drops would never end.
        timeout = _openai().Timeout(None, connect=min(10, self.timeout))
        client = self._client("AsyncOpenAI", max_retries=0, timeout=timeout)
        try:
            while True:
                while len(tasks) < self.concurrency and not self._fatal and (work := work or self._next(items)):
                    if not self.reserve(work):
                        # What is in flight may turn out cheaper than what is set aside for it.
                        self._capped = self._capped or not tasks
                        break
                    tasks.add(loop.create_task(self._one(client, work)))
                    work = None
                if not tasks:
                    break
                done, tasks = loop.run_until_complete(asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED))
                for task in done:
                    if task.exception():
                        self._end(task.exception())
                        continue
                    answer, trouble = task.result()
                    last = trouble or last
                    if trouble:
                        self._row += 1
                    elif answer and not answer.failed:
                        self._row = 0
                        unread = not answer.captions and (answer.reason or "").startswith("no usable answer")
                        self._unread = self._unread + 1 if unread else 0
                    if answer:
                        yield answer
                self._judge(last, tasks)
            self.stopped = self.sentence() if self._capped else None
        finally:
            self._tidy(loop, client, tasks)
        if self._fatal:
            raise self._fatal

    def _next(self, items):
        """The work on the next item, None if there is none; what reading it raises is kept for the end."""
        try:
            item = next(items, None)
        except Exception as error:
            self._end(error)
            return None
        return None if item is None else Work(item)

    def _end(self, error):
        """No more requests; ``error`` is raised once those in flight are through."""
        self._fatal = self._fatal or error
        self._halt.set()

    def _judge(self, trouble, tasks):
        """Ends the run if the records that failed say that the next will fail too."""
        hopeless = trouble and not self._alive and (trouble.unreachable or not trouble.retry)
        if hopeless and (self._row >= self.concurrency or (self._row and not tasks)):
            self._end(
                HaclError(
                    f"{self.url} cannot be reached: {trouble.reason}; check base_url, and that the server runs."
                    if trouble.unreachable
                    else f"{self.url} accepts no request ({trouble.reason}); change the setting that it names."
                )
            )
        elif self._unread >= FAILED_IN_A_ROW:
            self._end(
                HaclError(
                    f"{self.url}: {self._unread} records in a row got no usable answer, the last was "
                    f"{self._clean(self._sample)!r}; see to the model, --prompt-file or --response-format."
                )
            )
        elif self._row >= FAILED_IN_A_ROW:
            self._end(
                HaclError(
                    f"{self.url}: {self._row} records in a row failed, the last with: {trouble.reason}; see to the "
                    "endpoint, then run again to go on."
                )
            )

    def _adapt(self, form, text):
        """Whether a request that was refused with ``text`` is worth sending in another form than ``form``.

        Finds that form for all requests to come, and prints a line about it.
        """
        if form != self._form:  # another request has found it meanwhile
            return True
        response_format, limit = form
        if response_format != "text" and FORMAT.search(text):
            self._form = ("json" if response_format == "schema" else "text", limit)
            changed = f"response_format {response_format!r}", repr(self._form[0])
        elif limit == "max_tokens" and "max_completion_tokens" in text:
            self._form = (response_format, "max_completion_tokens")
            changed = limit, self._form[1]
        else:
            return False
        print(f"{self.url} does not take {changed[0]}; going on with {changed[1]}.", file=sys.stderr)
        return True

    @staticmethod
    def _tidy(loop, client, tasks):
        """Cancels what is in flight and closes connections and loop, without a word from asyncio."""
        pending = asyncio.all_tasks(loop)
        for task in pending:
            task.cancel()

        async def close():
            await asyncio.gather(*pending, return_exceptions=True)
            await client.close()
            await loop.shutdown_asyncgens()
            await loop.shutdown_default_executor()

        try:
            loop.run_until_complete(close())
        finally:
            loop.close()
            for task in tasks:  # an exception that nobody asks for is printed when its task is collected
                if task.done() and not task.cancelled():
                    task.exception()

    async def _one(self, client, work):
        """An item's answer and the trouble it failed by, or None; no answer if the run ends before it cost anything."""
        try:
            while work.missing():
                response, trouble = await self._request(client, work)
                if trouble:
                    if trouble.fatal:
                        self._end(HaclError(trouble.fatal))
                    if trouble.refused:
                        return work.answer(REFUSED), None
                    if self._fatal and not work.usage:
                        return None, None
                    return work.answer(f"endpoint: {trouble.reason}", failed=True), None if self._fatal else trouble
                if self.take(work, response):
                    break
                self.release(work)
                if not self.reserve(work):
                    self._capped = True
                    return work.answer("the spending cap is reached", failed=True), None
            return work.answer(), None
        finally:
            self.release(work)

    async def _request(self, client, work):
        """(JSON of a completion, None), or (None, trouble) after all retries."""
        loop, failures = asyncio.get_running_loop(), 0
        while True:
            while (wait := self._turn - loop.time()) > 0 and not self._fatal:
                await self._sleep(wait)
            if self._fatal:
                return None, _Trouble("the run ended early")
            self._turn = loop.time() + self._interval
            form = self._form
            trouble = _Trouble("the response is not JSON", retry=True)
            try:
                create = client.chat.completions.with_raw_response.create
                raw = await asyncio.wait_for(create(**self.body(work)), self.timeout)
            except (_openai().OpenAIError, asyncio.TimeoutError) as error:
                trouble = self._trouble(error)
            else:
                try:
                    response = json.loads(raw.http_response.content)
                    if is_completion(response):
                        self._alive = True
                        return response, None
                    trouble = _Trouble(f"the response is no completion ({self._clean(response)})", retry=True)
                except (ValueError, RecursionError):
                    pass
            if trouble.detail and self._adapt(form, trouble.detail):
                continue
            # An endpoint that has never answered is rather not there than busy.
            retries = min(2, self.retries) if trouble.unreachable and not self._alive else self.retries
            if not trouble.retry or failures >= retries:
                return None, trouble
            wait = trouble.wait or min(60, BACKOFF * 2**failures)
            failures += 1
            if trouble.wait:  # a limit is the account's, not this request's
                self._turn = max(self._turn, loop.time() + trouble.wait)
            await self._sleep(wait * (1 + random.random() / 4))

    async def _sleep(self, seconds):
        """Sleeps until the time is over or the run ends."""
        try:
            await asyncio.wait_for(self._halt.wait(), seconds)
        except asyncio.TimeoutError:
            pass
