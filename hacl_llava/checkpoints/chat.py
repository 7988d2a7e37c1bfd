"""``hacl-llava chat``: a first look at a LLaVA checkpoint, in the terminal."""

import contextlib
import signal
import sys
import types
import warnings
from typing import TYPE_CHECKING, TextIO

import torch
from transformers import TextStreamer

from ..common.images import open_image
from ..config import HaclError
from .command import ChatOptions
from .load import Loaded, load_pretrained
from .prompts import check_arguments, default_template, generation_settings, prompt_ids, say

# isort: split
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import SeparatorStyle, conv_templates
from llava.mm_utils import process_images

if TYPE_CHECKING:
    from PIL.Image import Image

HELP = """/image FILE  start anew with this image
/reset       start anew with the same image
/quit        end, as Ctrl-D and Ctrl-C do; while an answer is written, Ctrl-C stops it
Anything else goes to the model."""

HINT = "; give the path of an image"


class _Answer(TextStreamer):
    """Writes an answer word by word as it comes, without what ends a turn."""

    def __init__(self, tokenizer, end_of_turn, out):
        super().__init__(types.SimpleNamespace(decode=self._decode), skip_prompt=True)
        self.decoder, self.end_of_turn, self.out, self.raw, self.text = tokenizer, end_of_turn, out, "", ""
        self.line, self.before = [], []  # tokens of this line, and the last one of the line before it

    def _decode(self, ids):
        # TextStreamer decodes each line by itself; alone, a line would lose the space that it begins with.
        if ids[: len(self.line)] != self.line:
            self.before = self.line[-1:]
        self.line = list(ids)
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        before, text = (self.decoder.decode(i, **options) for i in (self.before, self.before + self.line))
        return text[len(before) :]

    def on_finalized_text(self, text, stream_end=False):
        self.raw += text  # whole words: an end of turn is never in two of them
        text = self.raw.partition(self.end_of_turn)[0].strip()
        new, self.text = text[len(self.text) :], text
        self.out.write(new)
        self.out.flush()


class Chat:
    """One conversation with a checkpoint, about one image or none.

    Args:
        loaded: what `load_pretrained` returns. template: a name of ``conv_templates``.
        temperature: 0 takes the likeliest token, more samples. max_new_tokens: of an answer.
        out: where answers are written as they come.

    Setting ``stopped`` while an answer is written ends it after the next token.
    """

    def __init__(
        self,
        loaded: Loaded,
        template: str,
        temperature: float = 0.0,
        max_new_tokens: int = 512,
        out: TextIO | None = None,
    ) -> None:
        self.tokenizer, self.model, self.image_processor, context = loaded
        self.template, self.out, self.max_new_tokens = conv_templates[template], out or sys.stdout, max_new_tokens
        self.plain = self.template.sep_style == SeparatorStyle.PLAIN
        self.turns, self.pixels, self.sizes, self.image_tokens, self.stopped = [], None, None, 0, False
        config = self.model.config
        self.context = getattr(config, "max_position_embeddings", context)
        # LLaVA cuts a prompt to tokenizer_model_max_length without a word: its end, which is the question.
        cut = getattr(config, "tokenizer_model_max_length", None) or self.context
        self.longest = min(cut, self.context - min(max_new_tokens, self.context // 4))
        self.tokenizer.model_max_length = sys.maxsize  # it would warn; lengths are watched here
        self.settings = settings = generation_settings(self.model, self.tokenizer, temperature)
        self.model.generation_config = settings  # newer transformers looks there for what it finds unset

    def show(self, image: "Image") -> None:
        """Start anew with an image (PIL, RGB).

        Raises:
            HaclError: the checkpoint's image processor cannot take it.
        """
        try:
            pixels = process_images([image], self.image_processor, self.model.config)
        except ValueError as error:
            raise HaclError(f"an image of {image.size} cannot be processed ({error}); give another one.") from None
        pixels, sizes = pixels.to(self.model.device, dtype=self.model.dtype), [image.size]
        # How many tokens an image takes differs between LLaVA 1.5, 1.6 and towers. (A single id is not looked at.)
        ids = torch.tensor([[IMAGE_TOKEN_INDEX, 0]], device=self.model.device)
        with torch.inference_mode():
            parts = self.model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, pixels, sizes)
        self.turns, self.pixels, self.sizes, self.image_tokens = [], pixels, sizes, parts[4].shape[1] - 1

    def ask(self, question: str) -> str:
        """Write the answer to ``out`` as it comes; both join the conversation.

        Where it grows longer than the model's context, its oldest turns are dropped, and stderr says so.

        Returns:
            The answer, or what there was of it when ``stopped`` was set.

        Raises:
            HaclError: the question alone is too long.
        """
        question = question.encode("utf-8", "replace").decode().replace(DEFAULT_IMAGE_TOKEN, "").strip()
        turns = list(self.turns)
        while (length := (ids := self._prompt(turns, question)).shape[1] + self.image_tokens) > self.longest:
            if not turns:
                raise HaclError(f"the question has {length} tokens, its image's included; allowed are {self.longest}.")
            del turns[0]
        if len(turns) < len(self.turns):
            say(f"(too long for the model by now: the oldest {len(self.turns) - len(turns)} turns are dropped)")
        end = self.template.sep2 or self.template.sep
        answer = _Answer(self.tokenizer, end, self.out)
        self.settings.max_new_tokens = min(self.max_new_tokens, self.context - length)
        try:
            with torch.inference_mode():
                self.model.generate(
                    ids,
                    images=self.pixels,
                    image_sizes=self.sizes,
                    generation_config=self.settings,
                    streamer=answer,
                    stopping_criteria=[lambda ids, *_, **__: self.stopped or self._ends(ids, end)],
                )
        except KeyboardInterrupt:
            if not self.stopped:
                raise
        answer.end()
        print(file=self.out, flush=True)
        text = answer.text.replace(DEFAULT_IMAGE_TOKEN, "")
        if text and not self.plain:  # templates have no place for a turn without an answer
            turns.append((question, text))
        self.turns = turns
        return answer.text

    def _ends(self, ids, end):
        return end in self.tokenizer.decode(ids[0, -len(end) :])  # a token has a character at least

    def _prompt(self, turns, question):
        turns, image = (*turns, (question, None)), self.pixels is not None
        return prompt_ids(turns, self.template, self.tokenizer, self.model.config, image).to(self.model.device)


def run(options: ChatOptions) -> int:
    """Answer one question on stdout, or talk until the user ends it; returns 0.

    Raises:
        HaclError: an argument is out of range; the checkpoint or, with a question, the image cannot be read.
    """
    check_arguments(options)
    if not 0 <= options.temperature < float("inf"):
        raise HaclError(f"--temperature is {options.temperature}; allowed are 0 (no sampling) and more.")
    if options.max_new_tokens < 1:
        raise HaclError(f"--max-new-tokens is {options.max_new_tokens}; allowed are 1 and more.")
    once, out = options.question is not None, sys.stdout
    if once and not (options.question.strip() or options.image):
        raise HaclError("--question is empty, and there is no --image to caption; ask something.")
    image = open_image(options.image, HINT) if once and options.image else None  # before minutes of loading
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`do_sample` is set to `False`")  # vicuna's generation_config
        loaded = load_pretrained(options.checkpoint, options.base, **options.settings())
    template = options.conv or default_template(options.checkpoint, options.base, loaded.model.config, loaded.tokenizer)
    chat = Chat(loaded, template, options.temperature, options.max_new_tokens, out)
    say(f"{options.checkpoint} on {loaded.model.device}, conversation template {template}.")
    if chat.plain:
        say("This template asks nothing: the answer to an image is its caption, whatever is typed. If the language")
        say("model was trained on instructions, --conv v1 (or its own) asks them.")
    if not once:
        return _converse(chat, options.image)
    if image:
        chat.show(image)
    chat.ask(options.question)
    return 0


def _converse(chat, image):
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() has a history then)
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    say("/image FILE shows it an image, /help lists the commands.")
    line = f"/image {image}" if image else None
    while line != "/quit":
        try:
            if line is not None:
                _do(chat, line)
            line = input("> " if sys.stdin.isatty() else "").strip()
        except HaclError as error:
            say(f"error: {error}")
            line = None
        except (EOFError, KeyboardInterrupt):
            say("")
            break
    return 0


def _do(chat, line):
    command, _, rest = line.partition(" ")
    if command == "/image":
        path = rest.strip(" '\"")
        chat.show(open_image(path, HINT))
        say(f"{path}: {chat.image_tokens} tokens." + (" Press Enter for its caption." if chat.plain else " Ask."))
    elif command == "/reset":
        chat.turns = []
        say("The conversation starts anew.")
    elif command.startswith("/"):
        say(HELP if command == "/help" else f"{command} is no command.\n{HELP}")
    elif line or (chat.plain and chat.pixels is not None):
        with _ctrl_c_stops(chat):
            chat.ask(line)
        if chat.stopped:
            say("(stopped)")


@contextlib.contextmanager
def _ctrl_c_stops(chat):
    # An exception is thrown into the middle of a forward pass only where the user insists.
    def stop(*_):
        if chat.stopped:
            raise KeyboardInterrupt
        chat.stopped = True

    chat.stopped = False
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
