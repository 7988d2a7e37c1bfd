"""Hallucinated captions from an OpenAI-compatible endpoint: request by request, or through the Batch API. Floor 2."""

import asyncio
import email.utils
import hashlib
import json
import os
import random
import re
import sys
import time
import uuid
from collections import Counter, deque
from pathlib import Path
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
LARGEST_FILE = 190_000_000  # bytes; OpenAI takes batch files up to 200 MB
FINAL = {"completed", "failed", "expired", "cancelled"}


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


class _Endpoint(Connection):
    """What both sources share: settings, request bodies, the reading of responses and errors, and the bill."""

    whole_blocks, _sample = False, ""

    def __init__(
        self, *, model, checker, prompt=None, base_url=None, key_env="OPENAI_API_KEY", temperature=1.0,
        max_output_tokens=None, timeout=60, retries=6, attempts=3, response_format="schema", price=None,
        max_cost=None, spent=None, seed=None,
    ):  # fmt: skip
        self.checker, self.prompt = checker, prompt or Prompt()
        self.temperature, self.max_output_tokens, self.seed = temperature, max_output_tokens, seed
        self.retries, self.attempts = retries, attempts
        self.price, self.max_cost = price, max_cost
        self.spent = Counter(spent or {})
        self.stopped = None
        if response_format not in FORMATS:
            raise HaclError(f"response_format is {response_format!r}, allowed is one of {', '.join(FORMATS)}.")
        if attempts < 1 or retries < 0 or timeout <= 0:
            raise HaclError(
                f"attempts is {attempts}, retries {retries}, timeout {timeout}; allowed is attempts >= 1, retries >= 0 "
                "and a timeout above 0 seconds."
            )
        if max_cost is not None and not price:
            raise HaclError(
                f"max_cost is {max_cost}, but without a price nothing can be counted against it; give price too, the "
                "dollars per million tokens of input and of output."
            )
        self._form = (response_format, "max_tokens")
        self._flying = Counter()  # tokens set aside for requests under way
        self._alive = False  # whether a completion has come back
        super().__init__(model, base_url, key_env, timeout)

    def _body(self, work):
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

    def _reserve(self, work):
        """Sets tokens aside for the next request of ``work``; False if it might pass the cap."""
        text = json.dumps(self._body(work), ensure_ascii=False)
        need = Counter(input=_tokens(text), output=self._limit(work))
        total = self.spent + self._flying + need
        if self.max_cost is not None and dollars(total, self.price) > self.max_cost:
            return False
        work.reserved = need
        self._flying += need
        return True

    def _release(self, work):
        self._flying -= work.reserved
        work.reserved = Counter()

    def _sentence(self):
        """The sentence for ``stopped``."""
        return (
            f"stopped by the spending cap: ${dollars(self.spent, self.price):.4f} of ${self.max_cost} is spent "
            f"({self.spent['input']} tokens of input, {self.spent['output']} of output) and one more request might "
            "pass it; to go on, run again with a higher max_cost."
        )

    # ---- responses

    def _take(self, work, response):
        """Takes what a chat completion (its JSON) holds for ``work``; True if there is nothing left to ask."""
        self._alive = True
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

    # ---- errors

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


def _is_completion(response):
    return isinstance(response, dict) and isinstance(response.get("choices"), list)


class ApiSource(_Endpoint):
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

    def __init__(self, *, concurrency=16, requests_per_minute=None, **settings):
        super().__init__(**settings)
        if concurrency < 1 or (requests_per_minute is not None and requests_per_minute <= 0):
            raise HaclError(
                f"concurrency is {concurrency}, requests_per_minute {requests_per_minute}; allowed is a concurrency "
                ">= 1 and more than 0 requests per minute (or None)."
            )
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
                    if not self._reserve(work):
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
            self.stopped = self._sentence() if self._capped else None
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
                if self._take(work, response):
                    break
                self._release(work)
                if not self._reserve(work):
                    self._capped = True
                    return work.answer("the spending cap is reached", failed=True), None
            return work.answer(), None
        finally:
            self._release(work)

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
                raw = await asyncio.wait_for(create(**self._body(work)), self.timeout)
            except (_openai().OpenAIError, asyncio.TimeoutError) as error:
                trouble = self._trouble(error)
            else:
                try:
                    response = json.loads(raw.http_response.content)
                    if _is_completion(response):
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


class BatchSource(_Endpoint):
    """The same through OpenAI's Batch API: answers within 24 hours, at half the price.

    Settings as for `ApiSource` (``price``: that of batches), and ``state_path``: a JSON file that says which batches
    were made. Killed at any time and started again with the same file and the same items (less those answered), it
    goes on where it was. ``poll_seconds``: between looks at the batches. ``chunk``: requests in a batch (OpenAI allows
    50000).

    Raises:
        HaclError: as `ApiSource`, or the state file belongs to a run with other settings.
    """

    def __init__(self, *, state_path, poll_seconds=60, chunk=20000, **settings):
        super().__init__(**settings)
        if not 1 <= chunk <= 50000 or poll_seconds < 0:
            raise HaclError(
                f"chunk is {chunk}, poll_seconds {poll_seconds}; allowed is a chunk from 1 to 50000 requests and "
                "poll_seconds >= 0."
            )
        self.state_path, self.poll_seconds, self.chunk = Path(state_path), poll_seconds, chunk
        made_by = [self.url, self.model, self.prompt.digest(), self.temperature, self.max_output_tokens, self.seed]
        self._digest = hashlib.sha256(json.dumps(made_by).encode()).hexdigest()[:16]

    def answers(self, items):
        """Yields an `Answer` for each of ``items`` as batches end; blocks until all have."""
        works = {item.index: Work(item) for item in items}
        self.stopped, self._flying = None, Counter()
        # Retries beyond a few are left to _call, which waits longer.
        client = self._client("OpenAI", max_retries=2, timeout=self.timeout)
        try:
            yield from self._answers(client, works)
        finally:
            client.close()

    def _answers(self, client, works):
        for index in [index for index, work in works.items() if not work.missing()]:
            yield works.pop(index).answer()
        state = self._load()
        if any(chunk["batch"] is None for chunk in state["chunks"]):
            self._adopt(client, state)
        active = [chunk for chunk in state["chunks"] if any(i in works for i, _ in _members(state, chunk))]
        for chunk in active:
            self._flying.update({} if chunk["done"] else chunk["reserved"])
        hold = False  # whether the account's limit of enqueued tokens is reached
        while True:
            freed = full = False
            for chunk in list(active):
                missing = f"batch {chunk['batch']} of {self.state_path}; use the key that made it, or delete the file"
                batch = self._call(client.batches.retrieve, chunk["batch"], missing=missing)
                if batch.status not in FINAL:
                    continue
                errors = (batch.errors and batch.errors.data) or []
                reason = f"the batch has {batch.status}" + "".join(f" ({self._clean(e.message)})" for e in errors[:1])
                limited = any(e.code == "token_limit_exceeded" for e in errors)
                if not limited:
                    yield from self._collect(client, state, chunk, batch, works, reason)
                active.remove(chunk)
                freed, full = freed or not limited, full or (limited and not chunk["done"])
                if not chunk["done"]:
                    self._flying -= Counter(chunk["reserved"])
                    chunk["done"] = True
                self._save(state)
            hold = (hold or full) and not freed
            if hold and not active:
                raise HaclError(f"{self.url} takes no batch of {self.chunk} requests: {reason}; lower chunk.")
            asked = {index for chunk in active for index, _ in _members(state, chunk)}
            queue = deque(index for index in works if index not in asked)
            while queue and not hold and (chunk := self._submit(client, state, works, queue)):
                active.append(chunk)
            if not active:
                break
            time.sleep(self.poll_seconds)
        for work in works.values():  # what the spending cap left unasked
            if work.usage:
                yield work.answer("the spending cap is reached", failed=True)
        self.stopped = self._sentence() if works else None

    def _submit(self, client, state, works, queue):
        """Makes a batch of the first in ``queue``; returns its chunk, or None if the spending cap forbids."""
        lines, ids, size, reserved = [], [], 0, Counter()
        while queue and len(ids) < self.chunk and size < LARGEST_FILE and self._reserve(works[queue[0]]):
            work = works[queue.popleft()]
            ids.append(f"{work.item.index}-{work.attempt + work.failures}")
            request = {"custom_id": ids[-1], "method": "POST", "url": "/v1/chat/completions", "body": self._body(work)}
            lines.append(json.dumps(request, ensure_ascii=False).encode() + b"\n")
            size += len(lines[-1])
            reserved += work.reserved
        if not ids:
            return None
        n, state["next"] = state["next"], state["next"] + 1
        chunk = {"n": n, "batch": None, "done": False, "form": self._form, "reserved": dict(reserved), "ids": ids}
        state["chunks"].append(chunk)
        # Written before the batch is made, so that it is known afterwards whose it is.
        self._save(state)
        name = f"hacl-{state['run']}-{n}.jsonl"
        file = (name, b"".join(lines))
        file = self._call(client.files.create, file=file, purpose="batch", timeout=max(600, self.timeout))
        chunk["batch"] = self._create(client, state, n, file.id)
        self._save(state)
        return chunk

    def _create(self, client, state, n, file_id):
        """Id of the batch made of an uploaded file. A call that got no answer is looked up, not just repeated."""
        create = client.with_options(max_retries=0).batches.create
        for left in reversed(range(self.retries + 1)):
            try:
                return create(
                    input_file_id=file_id,
                    endpoint="/v1/chat/completions",
                    completion_window="24h",
                    metadata={"hacl_run": state["run"], "chunk": str(n)},
                ).id
            except _openai().OpenAIError as error:
                trouble = self._trouble(error)
            if not trouble.retry or not left:
                raise HaclError(trouble.fatal or f"{self.url} makes no batch ({trouble.reason}); run again to go on.")
            time.sleep(max(trouble.wait, self.poll_seconds))
            if found := self._find(client, state).get(str(n)):
                return found

    def _find(self, client, state):
        """Ids of this run's batches by chunk number (a string), as the endpoint lists them."""

        def find():
            found = {}
            for batch in client.batches.list(limit=100):  # the newest first
                if batch.created_at < state["created"] - 86400:
                    break
                if (batch.metadata or {}).get("hacl_run") == state["run"]:
                    found[batch.metadata["chunk"]] = batch.id
            return found

        return self._call(find)

    def _adopt(self, client, state):
        """Looks for the batches of chunks at which the run was killed; a chunk that has none is asked anew."""
        found = self._find(client, state)
        for chunk in state["chunks"]:
            chunk["batch"] = chunk["batch"] or found.get(str(chunk["n"]))
        state["chunks"] = [chunk for chunk in state["chunks"] if chunk["batch"]]
        self._save(state)

    def _collect(self, client, state, chunk, batch, works, reason):
        """Yields the answers that a batch completes, and takes them out of ``works``."""
        replies = {}
        for file in (batch.error_file_id, batch.output_file_id):
            try:
                missing = f"file {file} of batch {batch.id}"
                content = self._call(client.files.content, file, missing=missing).content if file else b""
            except _Absent:  # deleted: as if unanswered
                continue
            for line in content.split(b"\n"):
                try:
                    reply = json.loads(line)
                    replies[reply["custom_id"]] = reply
                except (ValueError, KeyError, TypeError):  # a broken line: as if unanswered
                    continue
        for index, custom_id in _members(state, chunk):
            if index not in works:
                continue
            work, reply = works[index], replies.get(custom_id) or {}
            response = reply.get("response") or {}
            body, status = response.get("body"), response.get("status_code")
            if status == 200 and _is_completion(body):
                if not self._take(work, body):
                    continue
                answer = work.answer()
            else:
                said = reply.get("error") or (isinstance(body, dict) and body.get("error")) or body
                text = self._clean(json.dumps(said), 5000) if said else ""
                message = said.get("message") if isinstance(said, dict) else None
                if status in (400, 422) and self._adapt(tuple(chunk["form"]), text):
                    continue
                work.failures += 1
                if POLICY.search(text) and status in (400, 403, 422):
                    answer = work.answer(REFUSED)
                elif work.failures < 2:
                    continue
                else:
                    why = f"{status or 'batch'}: {self._clean(message or text)}" if text else reason
                    answer = work.answer(f"endpoint: {why}", failed=True)
            if answer.failed:  # the next run asks it as if for the first time
                state["forgotten"][str(index)] = state["next"]
            del works[index]
            yield answer

    def _call(self, function, *args, missing=None, **kwargs):
        """What a call of the client gives; waits for an endpoint that is away for a while.

        ``missing``: what a 404 means. Raises HaclError (`_Absent` for a 404); running again goes on.
        """
        openai = _openai()
        for left in reversed(range(self.retries + 1)):
            try:
                result = function(*args, **kwargs)
                self._alive = True
                return result
            except openai.OpenAIError as error:
                trouble, absent = self._trouble(error), isinstance(error, openai.NotFoundError)
            if absent and missing:
                raise _Absent(f"{self.url} has no {missing} ({trouble.reason}).")
            if trouble.fatal or not trouble.retry or not left or not self._alive:
                raise HaclError(trouble.fatal or f"{self.url}: {trouble.reason}; run again to go on where this ended.")
            time.sleep(max(trouble.wait, self.poll_seconds))

    def _load(self):
        """The state of the run, new if there is no file yet."""
        if not self.state_path.exists():
            state = {"run": uuid.uuid4().hex, "created": int(time.time()), "settings": self._digest}
            state |= {"next": 0, "chunks": [], "forgotten": {}}
            self._save(state)
            return state
        try:
            state = json.loads(self.state_path.read_text(encoding="utf-8"))
            settings = state["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise HaclError(f"{self.state_path} is no state of a batch run ({error}); give another path.") from None
        if settings != self._digest:
            raise HaclError(
                f"{self.state_path} belongs to a run with another endpoint, model, prompt, temperature, "
                "max_output_tokens or seed; set them as they were, or give another path for a new run."
            )
        return state

    def _save(self, state):
        """Writes the state so that a kill leaves the old file or the new one."""
        new = self.state_path.with_name(self.state_path.name + ".tmp")
        with open(new, "w", encoding="utf-8") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.state_path)


class _Absent(HaclError):
    """The endpoint does not know what is asked for."""


def _members(state, chunk):
    """(index, custom id) of each request of a chunk whose outcome still counts."""
    for custom_id in chunk["ids"]:
        index = custom_id.partition("-")[0]
        if state["forgotten"].get(index, 0) <= chunk["n"]:
            yield int(index), custom_id
