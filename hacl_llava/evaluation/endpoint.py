"""Models and judges behind an OpenAI-compatible endpoint."""

import base64
import io
import sys
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

from ..common.images import image_file, open_image
from ..config import HaclError
from ..hallucinate.api import FAILED_IN_A_ROW, Connection
from .journal import Answer

RETRIES = 6  # of the openai package, with its own pauses or those that the endpoint asks for
LARGEST_IMAGE = 10_000_000  # bytes sent as they are


class NotAnswered(Exception):
    """One request came to nothing: refused by a content policy, not accepted, or failed again and again."""


class Endpoint(Connection):
    """Chat completions of one model.

    Args:
        model: its name. base_url: OpenAI's, or that of ``OPENAI_BASE_URL``, if None. key_env: the environment variable
            that holds the key. timeout: seconds for one request. concurrency: requests in flight at most.

    Raises:
        HaclError: no address, or no key where one is needed. ImportError: the package openai is not installed.
    """

    def __init__(self, model, base_url=None, key_env="OPENAI_API_KEY", timeout=120, concurrency=8):
        super().__init__(model, base_url, key_env, timeout)
        self.concurrency, self.rubric = concurrency, None  # a judge has one
        self.client = self._client("OpenAI", max_retries=RETRIES, timeout=timeout)
        self._limit, self._temperature = "max_tokens", True  # what the endpoint takes

    def ask(self, messages, max_tokens, temperature=0):
        """The text of one completion.

        Args:
            messages: as the chat completions API takes them. max_tokens: of the answer.

        Raises:
            NotAnswered: this request came to nothing. HaclError: so will all others (key, credit, address, model).
        """
        import openai

        while True:
            limit, heated = self._limit, self._temperature
            settings = {limit: max_tokens, **({"temperature": temperature} if heated else {})}
            try:
                response = self.client.chat.completions.create(model=self.model, messages=messages, **settings)
                return self._text(response, max_tokens)
            except openai.OpenAIError as error:
                trouble = self._trouble(error)
            except UnicodeEncodeError:
                raise NotAnswered("the question has half a character, which no request can hold") from None
            if trouble.fatal:
                raise HaclError(trouble.fatal)
            if trouble.unreachable:
                raise HaclError(f"{self.url} cannot be reached: {trouble.reason}; check that the server runs.")
            if trouble.refused:
                raise NotAnswered(f"refused by the endpoint's content policy ({trouble.reason})")
            if not self._adapt(limit, heated, trouble.detail):
                raise NotAnswered(trouble.reason)

    def _adapt(self, limit, heated, text):
        """Whether a request refused with ``text`` is worth sending in the form that is found here for all to come."""
        if (limit, heated) != (self._limit, self._temperature):  # another thread found it meanwhile
            return True
        if limit == "max_tokens" and "max_completion_tokens" in text:
            self._limit = changed = "max_completion_tokens"
        elif heated and "temperature" in text:
            self._temperature, changed = False, "its own temperature"
        else:
            return False
        print(
            f"{self.url}: {self.model} does not take the settings asked for; going on with {changed}.", file=sys.stderr
        )
        return True

    def _text(self, response, max_tokens):
        choices = getattr(response, "choices", None)
        message = getattr(choices[0], "message", None) if choices else None
        if message is None:
            raise NotAnswered(f"what came back is no chat completion ({self._clean(response, 100)})")
        if getattr(message, "refusal", None) or choices[0].finish_reason == "content_filter":
            raise NotAnswered("refused by the endpoint's content policy")
        text = message.content
        text = text.strip() if isinstance(text, str) else ""
        if not text and choices[0].finish_reason == "length":
            raise NotAnswered(f"no text within {max_tokens} tokens; allow more with --max-new-tokens")
        return text

    def answers(self, questions, images, max_new_tokens):
        """Ask questions about images; as `Answerer.answers`, in the order in which answers come.

        Raises:
            HaclError: nothing more can be asked; answers of requests under way are yielded before.
        """

        def one(question):
            try:
                uri = data_uri(images, question.image)
            except HaclError as error:
                return Answer(question, error=str(error)), False
            content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": question.text}]
            try:
                return Answer(question, self.ask([{"role": "user", "content": content}], max_new_tokens)), False
            except NotAnswered as error:
                return Answer(question, error=str(error)), True

        in_a_row = 0
        for _, (answer, failed) in concurrently(one, questions, self.concurrency):
            yield answer
            in_a_row = in_a_row + 1 if failed else 0
            if in_a_row >= FAILED_IN_A_ROW:
                raise HaclError(f"{self.url}: {in_a_row} questions in a row failed, the last with: {answer.error}.")


def concurrently(function, items, workers):
    """Yield (item, function(item)) as they come, ``workers`` at a time.

    A `HaclError` is raised after what was under way has been yielded; nothing new is begun then.
    """
    items, pending, fatal = iter(items), {}, None
    pool = ThreadPoolExecutor(workers)
    try:
        while True:
            while fatal is None and len(pending) < workers:
                try:
                    item = next(items)
                except StopIteration:
                    break
                pending[pool.submit(function, item)] = item
            if not pending:
                break
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                item = pending.pop(future)
                try:
                    result = future.result()
                except HaclError as error:
                    fatal = fatal or error
                    continue
                yield item, result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if fatal:
        raise fatal


def data_uri(folder, name):
    """An image as a data URI: JPEG and PNG as they are unless they are huge, others as JPEG.

    Raises:
        HaclError: it cannot be read, or leads out of the folder.
    """
    from PIL import Image

    path = image_file(folder, name)
    image = open_image(path)  # a damaged one is seen here, not at the endpoint
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as stored:
        kind = stored.format
    if kind not in ("JPEG", "PNG") or len(data) > LARGEST_IMAGE:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95)
        kind, data = "JPEG", buffer.getvalue()
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"
