"""``hacl-llava chat``: a first look at a LLaVA checkpoint, in the terminal."""

import argparse
import contextlib
import copy
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from . import compat  # noqa: F401  (before llava)
from .common.images import open_image
from .config import HaclError
from .loading import Loaded, load_pretrained

# isort: split
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, SeparatorStyle, conv_templates
from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token

if TYPE_CHECKING:
    from PIL.Image import Image

HELP = """/image FILE  start anew with this image
/reset       start anew with the same image
/quit        end, as Ctrl-D and Ctrl-C do; while an answer is written, Ctrl-C stops it
Anything else goes to the model."""
# What a checkpoint's generation_config says of these is not for one streamed answer, or (sampling) not for greedy ones.
_NOT_KEPT = ("max_length", "min_length", "num_beams", "num_return_sequences")
_SAMPLING = ("temperature", "top_p", "top_k", "typical_p", "min_p", "epsilon_cutoff", "eta_cutoff")

HINT = "; give the path of an image"


def default_template(
    path: str | os.PathLike,
    base: str | os.PathLike | None,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """The conversation template that a checkpoint was trained with, as far as its kind and names tell.

    Args:
        path: the checkpoint's folder or name. base: its language model's, or None.
        config: the model's. tokenizer: the language model's.

    Returns:
        A name of ``llava.conversation.conv_templates``.
    """
    stage1 = getattr(config, "tune_mm_mlp_adapter", False)
    name = get_model_name_from_path(str(Path(stage1 and base or path).absolute())).lower()
    instructed = any(word in name for word in ("vicuna", "chat", "instruct")) or tokenizer.chat_template
    if stage1 and not instructed:
        return "plain"
    if config.model_type == "llava_mistral" and "mistral_instruct" in conv_templates:
        return "mistral_instruct"
    return "llava_llama_2" if "llama-2" in name else "chatml_direct" if "v1.6-34b" in name else "v1"


def generation_settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, temperature: float = 0.0
) -> GenerationConfig:
    """A checkpoint's own generation settings, without what is not for one answer or (temperature 0) a greedy one.

    Returns:
        A ``GenerationConfig``, to be handed to ``generate`` and put in place of the model's own: newer transformers
        look there for what they find unset.
    """
    settings = copy.deepcopy(model.generation_config)
    for name in _NOT_KEPT if temperature else _NOT_KEPT + _SAMPLING:
        setattr(settings, name, getattr(GenerationConfig(), name, None))
    settings.do_sample, settings.use_cache = temperature > 0, True
    settings.pad_token_id = settings.pad_token_id or 0  # never seen: rows are cut at their end
    if temperature:
        settings.temperature = temperature
    if settings.eos_token_id is None:
        settings.eos_token_id = tokenizer.eos_token_id
    return settings


def prompt_ids(
    turns: Sequence[tuple[str, str | None]],
    template: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    image: bool = True,
) -> torch.Tensor:
    """The prompt of a conversation, built as LLaVA's ``eval/model_vqa_loader.py`` builds that of one question.

    Args:
        turns: [(question, answer)], the last answer None. template: a ``Conversation``. tokenizer: the model's.
        config: the model's. image: whether the first question is about an image.

    Returns:
        Token ids [1, n], ``IMAGE_TOKEN_INDEX`` where the image goes. The ``plain`` template, which asks nothing, gives
        the image alone, as stage 1 trains it.
    """
    image = DEFAULT_IMAGE_TOKEN if image else ""
    if template.sep_style == SeparatorStyle.PLAIN:
        prompt = image or turns[-1][0]
    else:
        if image and getattr(config, "mm_use_im_start_end", False):
            image = DEFAULT_IM_START_TOKEN + image + DEFAULT_IM_END_TOKEN
        before, conv = image and image + "\n", template.copy()
        for asked, answered in turns:
            conv.append_message(conv.roles[0], before + asked)
            conv.append_message(conv.roles[1], answered)
            before = ""
        prompt = conv.get_prompt()
    return tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]


class _Answer(BaseStreamer):
    """Writes the text of the tokens as they come, without what ends a turn."""

    def __init__(self, tokenizer, end_of_turn, out):
        self.tokenizer, self.end_of_turn, self.out = tokenizer, end_of_turn, out
        self.prompt_seen, self.ids, self.start, self.read = False, [], 0, 0
        self.raw, self.text, self.shown, self.complete = "", "", 0, False

    def put(self, value):
        if not self.prompt_seen:  # it comes first
            self.prompt_seen = True
            return
        self.ids += value.flatten().tolist()
        self._take()
        begun = (n for n in range(len(self.end_of_turn), 0, -1) if self.text.endswith(self.end_of_turn[:n]))
        self._show(self.text[: len(self.text) - next(begun, 0)].rstrip())

    def end(self):
        self._take(last=True)
        self._show(self.text)

    def _take(self, last=False):
        # A token's text depends on the one before it (spaces), and may be a part of a character. Decoding all of them
        # for each would slow long answers down: those before `start` are done with, those before `read` are in `raw`.
        ends = (self.read, len(self.ids))
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        before, now = (self.tokenizer.decode(self.ids[self.start : end], **options) for end in ends)
        if last or (len(now) > len(before) and not now.endswith("\ufffd")):
            self.raw += now[len(before) :]
            self.start, self.read = ends
        text, end, _ = self.raw.partition(self.end_of_turn)
        self.text, self.complete = text.strip(), bool(end)

    def _show(self, text):
        new, self.shown = text[self.shown :], max(self.shown, len(text))
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
        answer = _Answer(self.tokenizer, self.template.sep2 or self.template.sep, self.out)
        self.settings.max_new_tokens = min(self.max_new_tokens, self.context - length)
        try:
            with torch.inference_mode():
                self.model.generate(
                    ids,
                    images=self.pixels,
                    image_sizes=self.sizes,
                    generation_config=self.settings,
                    streamer=answer,
                    stopping_criteria=[lambda *_, **__: self.stopped or answer.complete],
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

    def _prompt(self, turns, question):
        turns, image = (*turns, (question, None)), self.pixels is not None
        return prompt_ids(turns, self.template, self.tokenizer, self.model.config, image).to(self.model.device)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse ``args.device`` where this machine has no such, and ``args.conv`` where LLaVA has no such template."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    devices = ["cpu", *(["cuda"] if gpus else []), *gpus]
    if args.device not in (None, *devices):
        raise HaclError(f"--device is {args.device!r}; allowed on this machine: {', '.join(devices)}.")
    if args.conv not in (None, *conv_templates):
        raise HaclError(f"--conv is {args.conv!r}; allowed are: {', '.join(sorted(conv_templates))}.")


def say(text: str) -> None:
    """Print what is no answer."""
    print(text, file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> int:
    """Answer one question on stdout, or talk until the user ends it.

    Args:
        args: the command line, as `hacl_llava.cli` reads it.

    Returns:
        0.

    Raises:
        HaclError: an argument is out of range; the checkpoint or, with a question, the image cannot be read.
    """
    check_arguments(args)
    if not 0 <= args.temperature < float("inf"):
        raise HaclError(f"--temperature is {args.temperature}; allowed are 0 (no sampling) and more.")
    if args.max_new_tokens < 1:
        raise HaclError(f"--max-new-tokens is {args.max_new_tokens}; allowed are 1 and more.")
    once, out = args.question is not None, sys.stdout
    if once and not (args.question.strip() or args.image):
        raise HaclError("--question is empty, and there is no --image to caption; ask something.")
    image = open_image(args.image, HINT) if once and args.image else None  # before minutes of loading
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`do_sample` is set to `False`")  # vicuna's generation_config
        loaded = load_pretrained(
            args.checkpoint, args.base, device=args.device, bits=args.bits, vision_tower=args.vision_tower
        )
    template = args.conv or default_template(args.checkpoint, args.base, loaded.model.config, loaded.tokenizer)
    chat = Chat(loaded, template, args.temperature, args.max_new_tokens, out)
    say(f"{args.checkpoint} on {loaded.model.device}, conversation template {template}.")
    if chat.plain:
        say("This template asks nothing: the answer to an image is its caption, whatever is typed. If the language")
        say("model was trained on instructions, --conv v1 (or its own) asks them.")
    if not once:
        return _converse(chat, args.image)
    if image:
        chat.show(image)
    chat.ask(args.question)
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
