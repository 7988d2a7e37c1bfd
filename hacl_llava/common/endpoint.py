"""One OpenAI-compatible endpoint, for whoever asks: captions, answers, judgements.

A request either is answered, or it comes to nothing by itself (`NotAnswered`), or the endpoint as a whole does not work
(`HaclError`: key, credit, model, address, or nothing but failures). Only the second says something of what was asked.
"""

import email.utils
import json
import os
import queue
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ..config import HaclError

OPENAI_URL = "https://api.openai.com/v1"
RETRIES = 6
BACKOFF = 1.0  # seconds before the first retry; each next waits twice as long, so that six outlast a limit per minute
LONGEST_WAIT = 600  # seconds; an endpoint that asks for a longer pause ends the run
FAILED_IN_A_ROW = 25
_POLICY = re.compile(
    r"content.?filter|content.?(management.)?policy|usage polic|ResponsibleAI|flagged|data_inspection_failed", re.I
)
_UNKNOWN_MODEL = re.compile(r"model_not_found|model\b.{0,80}not (exist|found)|(not a valid|unknown) model", re.I)
_FORMAT = re.compile(r"response.?format|json.?(schema|object)|structured.?output", re.I)
_THOUGHT = "think|thinking|thought|reasoning|seed:think"
_OPENED = re.compile(rf"\s*(<(?:{_THOUGHT})>|\[THINK\])")
_CLOSED = re.compile(rf"</(?:{_THOUGHT})>|\[/THINK\]")


class NotAnswered(Exception):
    """One request came to nothing; the message says why.

    Attributes:
        refused: by the endpoint's content policy or the model, which is an answer. busy: the endpoint was to blame.
        unreachable: there was nobody.
    """

    def __init__(self, reason: str, refused: bool = False, busy: bool = False, unreachable: bool = False):
        super().__init__(reason)
        self.refused, self.busy, self.unreachable = refused, busy, unreachable


class Reply(NamedTuple):
    """What a chat completion says.

    ``text``: without reasoning. ``refused``: by the model or a filter. ``cut``: it ran into the limit of its tokens.
    ``thinks``: its template opened the reasoning, of which a cut answer then holds no sign.
    """

    text: str
    refused: bool
    cut: bool
    thinks: bool


class _Trouble(NamedTuple):
    """Why a request came to nothing. ``wait``: seconds the endpoint asks for. ``fatal``: the message to end with."""

    reason: str
    retry: bool = False
    wait: float = 0.0
    fatal: str | None = None
    refused: bool = False
    unreachable: bool = False
    detail: str = ""  # all that the endpoint says about a request it does not accept


def is_completion(response: Any) -> bool:
    """Whether a decoded JSON is a chat completion."""
    return isinstance(response, dict) and isinstance(response.get("choices"), list)


def is_refusal(status: int | None, body: Any) -> bool:
    """Whether an error (HTTP status, JSON) is a content policy's, so that it is about what was asked."""
    return status in (400, 403, 422) and bool(_POLICY.search(json.dumps(body, default=str)))


def read_reply(response: Mapping[str, Any], thinks: bool = False) -> Reply:
    """Read a chat completion (decoded JSON). Of its text, reasoning is taken away, here and nowhere else.

    Reasoning comes as a field of its own (``reasoning_content``, which is not looked at), between ``<think>`` and
    ``</think>``, or up to a ``</think>`` that the chat template has opened.

    Args:
        thinks: whether an earlier reply of this model was of the last kind: a cut one without the end is all reasoning.
    """
    choice = response["choices"][0] if response["choices"] else None
    choice = choice if isinstance(choice, dict) else {}
    message = choice.get("message") if isinstance(choice.get("message"), dict) else {}
    text = message.get("content")
    if isinstance(text, list):  # of parts
        text = "".join(str(part.get("text") or "") for part in text if isinstance(part, dict))
    text = text if isinstance(text, str) else ""
    finish = choice.get("finish_reason")
    cut, opened, (*thought, text) = finish == "length", _OPENED.match(text), _CLOSED.split(text)
    if not thought and (opened or cut and thinks):
        text = ""  # it ended within its reasoning
    refused = bool(message.get("refusal")) or finish == "content_filter"
    return Reply(text.strip(), refused, cut, bool(thought) and not opened)


class Endpoint:
    """Chat completions of one model behind an OpenAI-compatible endpoint; safe to use from several threads.

    Args:
        model: its name at the endpoint. base_url: OpenAI's, or that of ``OPENAI_BASE_URL``, if None. key_env: the
            environment variable that holds the key. timeout: seconds for one request. retries: after 429, 5xx, a
            time-out, a lost connection or a page that is no JSON. concurrency: requests in flight at most.
            requests_per_minute: sent at most (None: no limit but the endpoint's).

    Raises:
        HaclError: a setting that is not allowed, no address, or no key where one is needed.
        ImportError: the package openai is not installed.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        key_env: str = "OPENAI_API_KEY",
        *,
        timeout: float = 120,
        retries: int = RETRIES,
        concurrency: int = 8,
        requests_per_minute: float | None = None,
    ):
        try:
            import openai
        except ImportError:
            raise ImportError("Asking an endpoint needs the package openai: pip install 'hacl_llava[api]'") from None
        if retries < 0 or timeout <= 0:
            raise HaclError(
                f"retries is {retries}, timeout {timeout}; allowed is retries >= 0 and a timeout above 0 seconds."
            )
        if concurrency < 1 or (requests_per_minute is not None and requests_per_minute <= 0):
            raise HaclError(
                f"concurrency is {concurrency}, requests_per_minute {requests_per_minute}; allowed is a concurrency "
                ">= 1 and more than 0 requests per minute (or None)."
            )
        self.model, self.timeout, self.retries, self.concurrency = model, timeout, retries, concurrency
        self.url = base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
        self._key_env, self._key = key_env, os.environ.get(key_env, "").strip()
        self._check_address()
        self.alive = False  # whether it has answered
        self.known = False  # whether it did in an earlier run, as who knows of one may say
        self._interval, self._turn = 60 / (requests_per_minute or float("inf")), 0.0
        self._changes, self._thinks = [], False  # what it does not take as it is asked; see `_fit`
        self._lock, self._halt = threading.Lock(), threading.Event()
        # The retries are this class's own: the client's wait a minute or two at most, ask an account without credit
        # again, and are not paced.
        times = openai.Timeout(timeout, connect=min(10, timeout))
        self._openai = openai
        self._client = openai.OpenAI(api_key=self._key or "none", base_url=self.url, max_retries=0, timeout=times)

    def _check_address(self):
        try:
            parts = urlsplit(self.url)
            right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            right = False
        if not right or "@" in parts.netloc or parts.query:
            raise HaclError(
                "base_url must be http(s)://host[:port]/path, without user name, password or query; a key belongs into "
                f"the environment variable {self._key_env}."
            )
        if not self._key and self.url == OPENAI_URL:
            raise HaclError(
                f"no key: the environment variable {self._key_env} is not set; set it to your key, or give base_url "
                "for an endpoint that needs none."
            )
        if not re.fullmatch(r"[!-~]*", self._key):
            raise HaclError(f"the key in {self._key_env} holds spaces or characters that no key has; set it again.")

    # ---- one request

    def ask(self, messages: list[dict], max_tokens: int, temperature: float = 0) -> str:
        """The text of one completion, without reasoning.

        Args:
            messages: as the chat completions API takes them. max_tokens: of the answer, reasoning included; where that
                leaves no text, it is asked for again with 4 and 16 times as many.

        Raises:
            NotAnswered: this request came to nothing. HaclError: so will all others.
        """
        for room in (max_tokens, 4 * max_tokens, 16 * max_tokens):  # reasoning may take all of it
            body = {"messages": messages, "max_tokens": room, "temperature": temperature}
            reply = read_reply(self.complete(body), self._thinks)
            self._thinks |= reply.thinks
            if reply.refused:
                raise NotAnswered("refused by the endpoint's content policy", refused=True)
            if reply.text or not reply.cut:
                return reply.text
        raise NotAnswered(f"no text within {room} tokens; allow more with --max-new-tokens")

    def complete(self, body: dict) -> dict:
        """One chat completion, as decoded JSON.

        Args:
            body: messages and settings, as the chat completions API takes them: ``max_tokens``, ``temperature``,
                ``seed`` and ``response_format`` are left out or renamed where the endpoint does not take them.

        Raises:
            NotAnswered: this request came to nothing, after all retries. HaclError: so will all others.
        """
        failures = 0
        while True:
            self._wait_for_turn()
            if self._halt.is_set():
                raise NotAnswered("the run ended early", busy=True)
            sent = self._fit(body)
            response, trouble = self._send(sent)
            if response is not None:
                return response
            if trouble.fatal:
                raise HaclError(trouble.fatal)
            if trouble.refused:
                self.alive = True
                raise NotAnswered(f"refused by the endpoint's content policy ({trouble.reason})", refused=True)
            if trouble.detail and self._adapt(sent, trouble.detail):
                continue
            # An endpoint that has never answered is rather not there than busy.
            retries = min(2, self.retries) if trouble.unreachable and not self.alive else self.retries
            if not trouble.retry or failures >= retries:
                raise NotAnswered(trouble.reason, busy=trouble.retry, unreachable=trouble.unreachable)
            wait = (trouble.wait or min(60, BACKOFF * 2**failures)) * (1 + random.random() / 4)
            failures += 1
            if trouble.wait:  # a limit is the account's, not this request's
                with self._lock:
                    self._turn = max(self._turn, time.monotonic() + trouble.wait)
            self._sleep(wait)

    def _wait_for_turn(self):
        while not self._halt.is_set():
            with self._lock:
                wait = self._turn - time.monotonic()
                if wait <= 0:
                    self._turn = time.monotonic() + self._interval
                    return
            self._sleep(wait)

    def _sleep(self, seconds):
        """Until the time is over, or the run ends."""
        self._halt.wait(seconds)

    def _send(self, body):
        """(JSON of a completion, None), or (None, trouble)."""
        deadline, parts = time.monotonic() + self.timeout, []
        try:
            with self._client.chat.completions.with_streaming_response.create(**body) as raw:
                for part in raw.iter_bytes():  # the client's time-out is for one read: drops would never end
                    parts.append(part)
                    if time.monotonic() > deadline:
                        raise TimeoutError
        except UnicodeEncodeError:
            return None, _Trouble("the question has half a character, which no request can hold")
        except Exception as error:
            if not isinstance(error, (self._openai.OpenAIError, TimeoutError)) and not _of_http(error):
                raise
            return None, self._trouble(error)
        try:
            response = json.loads(b"".join(parts))
        except (ValueError, RecursionError):
            return None, _Trouble("the response is not JSON", retry=True)
        if not is_completion(response):
            return None, _Trouble(f"the response is no chat completion ({self.clean(response, 100)})", retry=True)
        self.alive = True
        return response, None

    def clean(self, text: Any, length: int = 300) -> str:
        """A foreign text fit for a message: on one line, without the key, cut to a length."""
        text = " ".join(str(text).split())
        text = text.replace(self._key, "***") if self._key else text
        return text if len(text) <= length else text[:length] + "..."

    def _trouble(self, error):
        """What an exception of the client means."""
        openai = self._openai
        if isinstance(error, (openai.APITimeoutError, TimeoutError)) or type(error).__name__ == "ReadTimeout":
            unreachable = type(error.__cause__).__name__ == "ConnectTimeout"
            return _Trouble(f"no answer within {self.timeout:g} s", retry=True, unreachable=unreachable)
        if not isinstance(error, openai.APIStatusError):
            cause = error.__cause__ or error
            # Whatever breaks once a connection stands (Read..., RemoteProtocol...) says that somebody is there.
            unreachable = type(cause).__name__.startswith(("Connect", "Proxy", "Unsupported"))
            why = f"{type(cause).__name__}: {self.clean(cause)}"
            return _Trouble(f"no connection ({why})", retry=True, unreachable=unreachable)
        status, body = error.status_code, error.body
        body = body if isinstance(body, dict) else {"message": body}
        text = f"{status}: {self.clean(body.get('message') or body)}"
        codes = self.clean(json.dumps(body, default=str), 5000)
        trouble = _Trouble(text, detail=codes if status in (400, 422) else "")
        if status == 402 or "insufficient_quota" in codes:
            return trouble._replace(fatal=f"{self.url}: no credit is left ({text}); add some, then run again to go on.")
        if is_refusal(status, codes):
            return trouble._replace(refused=True)
        if status in (401, 403):
            key = f"check the environment variable {self._key_env}" if self._key else f"set {self._key_env} to a key"
            return trouble._replace(fatal=f"{self.url} refuses the key ({text}); {key}.")
        if status in (404, 405) or status in (400, 422) and not self.alive and _UNKNOWN_MODEL.search(codes):
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

    def _fit(self, body):
        """The body as this endpoint takes it, by what it has refused so far."""
        body, changes = {"model": self.model, **body}, tuple(self._changes)
        if "max_completion_tokens" in changes and "max_tokens" in body:
            body["max_completion_tokens"] = body.pop("max_tokens")
        if "json_object" in changes and (body.get("response_format") or {}).get("type") == "json_schema":
            body["response_format"] = {"type": "json_object"}
        for name in ("response_format", "temperature", "seed"):
            if f"no {name}" in changes:
                body.pop(name, None)
        return body

    def _adapt(self, sent, said):
        """Whether a body that was refused so is worth sending in another form, which is used from then on."""
        kind = (sent.get("response_format") or {}).get("type")
        if kind and _FORMAT.search(said):
            change = "json_object" if kind == "json_schema" else "no response_format"
        elif "max_tokens" in sent and "max_completion_tokens" in said:
            change = "max_completion_tokens"
        else:
            names = (name for name in ("temperature", "seed") if name in sent and re.search(rf"\b{name}\b", said))
            change = next((f"no {name}" for name in names), None)
        if change is None:
            return False
        with self._lock:
            if change not in self._changes:
                self._changes.append(change)
                print(
                    f"{self.url}: {self.model} does not take the settings asked for; going on with {change}.",
                    file=sys.stderr,
                )
        return True

    # ---- many requests

    def each(self, function: Callable[[Any], Any], items: Iterable) -> Iterator[tuple[Any, Any]]:
        """Yield (item, ``function(item)``) as they come, with `concurrency` at a time; `NotAnswered` as a result.

        What failed because the endpoint did is held back until something is answered, and is not yielded where nothing
        is any more: a run that ends so leaves nothing behind that looks like the items' own failure.

        Args:
            function: called in threads; asks by `ask` or `complete`. items: taken as needed; None among them: not now,
                first something under way has to come back.

        Raises:
            HaclError: the endpoint does not work, as of `complete` or since `FAILED_IN_A_ROW` items failed in a row.
                What ``function`` or ``items`` raise. What is under way is finished and yielded before.
        """
        self._halt.clear()
        items, threads, row, held, more, fatal = iter(items), _Threads(function), 0, [], True, None
        try:
            while True:
                while more and threads.busy < self.concurrency:
                    item, more, fatal = _next(items)
                    if item is not None:
                        threads.begin(item)
                    elif more and not threads.busy and held:
                        held, released = [], held
                        yield from released
                    else:
                        break
                if not threads.busy:
                    break
                item, result, error = threads.wait()
                if error is None or isinstance(error, NotAnswered) and error.refused:
                    if not self._halt.is_set():
                        yield from held
                    row, held = 0, []
                    yield item, error or result
                elif isinstance(error, NotAnswered):
                    row += 1
                    if (self.alive or self.known) and not error.busy:
                        yield item, error
                    else:
                        held.append((item, error))
                    fatal = fatal or self._hopeless(row, threads.busy, error)
                else:
                    fatal = fatal or error
                if fatal is not None:
                    more = False
                    self._halt.set()
            if not self._halt.is_set():
                yield from held
        finally:
            if threads.busy:  # closed, or Ctrl-C: nobody is there any more for what is under way
                self._halt.set()
            threads.end()
        if fatal is not None:
            raise fatal

    def stop(self) -> None:
        """Let nothing wait any longer and nothing new begin until the next `each`; what is under way may end."""
        self._halt.set()

    def _hopeless(self, row, flying, error):
        """The error to end with if so many failures in a row say that the next item will fail too, or None."""
        if not self.alive and (error.busy or not self.known) and (row >= self.concurrency or not flying):
            return HaclError(
                f"{self.url} cannot be reached: {error}; check base_url, and that the server runs."
                if error.unreachable
                else f"{self.url} has answered nothing: {error}; see to the endpoint, then run again."
                if error.busy
                else f"{self.url} accepts no request ({error}); change the setting that it names."
            )
        if row >= FAILED_IN_A_ROW:
            return HaclError(
                f"{self.url}: {row} requests in a row failed, the last with: {error}; see to the endpoint, then run "
                "again to go on."
            )
        return None


def _next(items):
    """(the next item or None, whether there may be more, what reading it raised or None)."""
    try:
        return next(items), True, None
    except StopIteration:
        return None, False, None
    except Exception as error:
        return None, False, error


class _Threads:
    """Calls a function in as many threads as it is begun at a time.

    They are daemons: Ctrl-C does not wait for an endpoint that hangs, as it would for those of concurrent.futures.
    """

    def __init__(self, function):
        self.function, self.busy, self.count = function, 0, 0
        self.todo, self.done = queue.SimpleQueue(), queue.SimpleQueue()

    def begin(self, item):
        self.todo.put((item,))
        self.busy += 1
        if self.count < self.busy:
            threading.Thread(target=self._work, daemon=True).start()
            self.count += 1

    def _work(self):
        while (task := self.todo.get()) is not None:
            try:
                self.done.put((*task, self.function(*task), None))
            except BaseException as error:  # whatever it is: raised where it is waited for
                self.done.put((*task, None, error))

    def wait(self):
        """(item, result, error) of the next that is through."""
        found = self.done.get()
        self.busy -= 1
        return found

    def end(self):
        for _ in range(self.count):
            self.todo.put(None)


def _of_http(error):
    """Whether an exception is of the client's own HTTP library, which openai does not wrap while a body is read."""
    return type(error).__module__.partition(".")[0].startswith("http") or isinstance(error, OSError)


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
