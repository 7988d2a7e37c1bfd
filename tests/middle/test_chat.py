"""hacl-llava chat: prompts, streaming, Ctrl-C, the context's end; through the real command line in a terminal."""

import fcntl
import io
import json
import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
import termios
import time
import types

import pytest
import torch
from conftest import load
from PIL import Image
from workers import Command

from hacl_llava import cli
from hacl_llava.checkpoints.chat import Chat, _Answer, _converse, _do
from hacl_llava.checkpoints.load import load_pretrained
from hacl_llava.checkpoints.prompts import default_template
from hacl_llava.common.images import open_image
from hacl_llava.config import HaclError

LONG = 1500  # tokens of an answer that takes seconds


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")  # the command sets it; not for other tests


@pytest.fixture(scope="module")
def whole(mini, tmp_path_factory):
    """A whole checkpoint that never ends an answer by itself; generation_config as Vicuna's, config as LLaVA-1.5's."""
    model, tokenizer = load(mini, stock=True)
    with torch.no_grad():
        model.lm_head.weight[:259] = 0  # special tokens and bytes: never the likeliest
    values = {"image_aspect_ratio": "pad", "tune_mm_mlp_adapter": False, "tokenizer_model_max_length": 2048}
    values["mm_use_im_patch_token"] = False
    model.config.update(values)
    folder = tmp_path_factory.mktemp("chat") / "llava-v1.5-mini"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "max_length": 4096, "temperature": 0.9, "top_p": 0.6})
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_length": 4096}))
    return folder


@pytest.fixture
def loaded(whole):

    return load_pretrained(whole, device="cpu")


@pytest.fixture
def chat(loaded):

    return Chat(loaded, "v1", max_new_tokens=8, out=io.StringIO())


@pytest.fixture
def picture(mini, records):
    return mini.images / records[0]["image"]


SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def stock_answer(loaded, prompt, picture, tokens):
    """What LLaVA's own functions and a plain greedy generate() give."""
    from llava.mm_utils import process_images, tokenizer_image_token

    tokenizer, model, processor, _ = loaded
    image = Image.open(picture).convert("RGB")
    pixels = process_images([image], processor, model.config)
    ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]
    more = {"do_sample": False, "max_new_tokens": tokens, "pad_token_id": 0, "use_cache": True}
    out = model.generate(ids, images=pixels, image_sizes=[image.size], **more)
    return tokenizer.decode(out[0], skip_special_tokens=True).strip()


def prompts_of(chat, monkeypatch):
    """The list that every prompt goes into, its image as -200, decoded around it."""
    seen, make = [], chat._prompt

    def spy(turns, question):
        ids = make(turns, question)
        seen.append(ids[0].tolist())
        return ids

    monkeypatch.setattr(chat, "_prompt", spy)
    return seen


@pytest.mark.parametrize(
    "path, base, kind, stage1, template",
    [
        ("liuhaotian/llava-v1.5-7b", None, "llava_llama", False, "v1"),
        ("out", None, "llava_llama", False, "v1"),
        ("liuhaotian/llava-v1.6-mistral-7b", None, "llava_mistral", False, "mistral_instruct"),
        ("liuhaotian/llava-v1.6-34b", None, "llava_llama", False, "chatml_direct"),
        ("liuhaotian/llava-llama-2-13b-chat-lightning-preview", None, "llava_llama", False, "llava_llama_2"),
        ("llava-hacl-pretrain", "llm", "llava_llama", True, "plain"),
        ("llava-hacl-pretrain", "lmsys/vicuna-7b-v1.5", "llava_llama", True, "v1"),
        ("pretrain", "mistralai/Mistral-7B-Instruct-v0.2", "llava_mistral", True, "mistral_instruct"),
        ("checkpoint-100", None, "llava_llama", False, "v1"),
    ],
)
def test_template_by_the_kind_of_checkpoint(path, base, kind, stage1, template):
    from llava.conversation import conv_templates

    config = types.SimpleNamespace(model_type=kind, tune_mm_mlp_adapter=stage1)
    assert default_template(path, base, config, types.SimpleNamespace(chat_template=None)) == template
    assert template in conv_templates


@pytest.mark.parametrize(
    "own, stage1, whole",
    [
        ("{{ messages }}", "v1", "v1"),
        ("<|im_start|>{{ message }}<|im_end|>", "chatml_direct", "chatml_direct"),
        ("<s>[INST] {{ message }} [/INST]", "mistral_instruct", "v1"),  # stage 2 teaches its own form
        ("<s>[INST] <<SYS>>{{ system }}<</SYS>>", "llava_llama_2", "v1"),
        ("<|start_header_id|>{{ role }}<|end_header_id|>", None, None),  # LLaVA 1.2 has none for Llama-3
        ("<|user|>\n{{ message }}</s>", None, "v1"),
    ],
)
def test_a_chat_template_says_how_the_llm_saw_instructions(own, stage1, whole):
    for tuned, template in ((True, stage1), (False, whole)):
        config = types.SimpleNamespace(model_type="llava_llama", tune_mm_mlp_adapter=tuned)
        tokenizer = types.SimpleNamespace(chat_template=own)
        if template is None:
            with pytest.raises(HaclError, match="llm: its tokenizer's chat template is .+ by --conv"):
                default_template("x", "llm", config, tokenizer)
        else:
            assert default_template("x", "llm", config, tokenizer) == template
        config.hacl_version = "llava_v1"  # what a stage 2 of ours has noted goes before all
        if not tuned:
            assert default_template("x", "llm", config, tokenizer) == "llava_v1"


def test_images_that_cannot_be_opened(tmp_path, picture):

    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "half.png").write_bytes(picture.read_bytes()[:200])
    for path in ("", tmp_path, tmp_path / "nowhere.png", tmp_path / "text.png", tmp_path / "half.png", "a\0b"):
        with pytest.raises(HaclError, match="cannot be opened .*; give one") as error:
            open_image(str(path), "; give one")
        assert "\n" not in str(error.value)


def test_exif_orientation_is_not_applied_as_in_llava(tmp_path):

    image, exif = Image.new("RGB", (40, 20)), Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(str(tmp_path / "turned.jpg")).size == (40, 20)


def streamed(tokenizer, end_of_turn, ids):
    """What is on the screen after each token and at the end, and the answer."""
    out, shown = io.StringIO(), []
    answer = _Answer(tokenizer, end_of_turn, out)
    answer.put(torch.tensor([[]], dtype=torch.long))  # the prompt's
    for token in ids:
        answer.put(torch.tensor([token]))
        shown.append(out.getvalue())
    answer.end()
    return [*shown, out.getvalue()], answer


def test_words_and_characters_of_several_tokens_are_streamed_as_they_are_decoded(loaded):
    tokenizer, rng = loaded.tokenizer, random.Random(0)
    foreign = tokenizer("é日本🙂", add_special_tokens=False).input_ids  # as bytes
    line = tokenizer.convert_tokens_to_ids("<0x0A>")
    assert len(foreign) > 12
    for _ in range(12):
        parts = [rng.choice((foreign, [line], [rng.randrange(259, len(tokenizer))])) for _ in range(60)]
        ids = [1, *(token for part in parts for token in part), 2]
        shown, answer = streamed(tokenizer, "</s>", ids)
        assert not any("\ufffd" in text for text in shown)  # a character's first bytes wait for the others
        whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
        assert shown[-1] == answer.text == whole
        assert all(b.startswith(a) for a, b in zip(shown, shown[1:])) and len(set(shown)) > 20
    shown, answer = streamed(tokenizer, "</s>", foreign[:-1])  # cut in the middle of a character
    assert shown[-1] == answer.text and answer.text.startswith("é日本") and "\ufffd" in answer.text


def test_the_end_of_a_turn_is_never_shown_and_ends_the_answer(loaded, monkeypatch):
    tokenizer = types.SimpleNamespace(decode=lambda ids, **_: "".join(map(chr, ids)))
    said = " #1 is ##red.\n## so###Human: and"
    shown, answer = streamed(tokenizer, "###", map(ord, said))
    want = said.partition("###")[0].strip()
    assert shown[-1] == answer.text == want and all(want.startswith(text) for text in shown)
    chat, made, generate = Chat(loaded, "v1", max_new_tokens=8, out=io.StringIO()), [], loaded.model.generate
    monkeypatch.setattr(loaded.model, "generate", lambda *a, **k: made.append(generate(*a, **k)))
    whole = chat.ask("Hi")
    chat.turns.clear()
    monkeypatch.setattr(chat.template, "sep2", whole.split()[1])
    assert chat.ask("Hi") == whole.split()[0] and made[0].shape[1] > made[1].shape[1] + 4


def test_answers_are_those_of_generate_and_the_conversation_goes_on(chat, loaded, picture, monkeypatch, capfd):

    capfd.readouterr()
    chat.show(open_image(str(picture)))
    assert chat.image_tokens == 9  # 3 x 3 patches
    first = chat.ask("What is there?")
    second = chat.ask("And the colour?")
    assert capfd.readouterr() == ("", "")  # no warnings
    assert chat.out.getvalue() == f"{first}\n{second}\n"
    prompt = f"{SYSTEM} USER: <image>\nWhat is there? ASSISTANT:"
    assert first == stock_answer(loaded, prompt, picture, 8)
    assert second == stock_answer(loaded, f"{prompt} {first}</s>USER: And the colour? ASSISTANT:", picture, 8)
    chat.show(open_image(str(picture)))
    assert chat.turns == [] and chat.ask("What is there?") == first


def test_a_wide_image_is_padded_and_without_an_image_there_is_no_image_token(chat, loaded, monkeypatch):
    from llava.mm_utils import process_images

    seen = prompts_of(chat, monkeypatch)
    chat.ask("Hello <image> there")  # typed by a user, it is no image
    assert -200 not in seen[0] and chat.turns[0][0] == "Hello  there"
    wide = Image.new("RGB", (80, 20), (200, 10, 10))
    chat.show(wide)
    assert torch.equal(chat.pixels, process_images([wide], loaded.image_processor, loaded.model.config))
    loaded.model.config.image_aspect_ratio = "square"
    assert not torch.equal(chat.pixels, process_images([wide], loaded.image_processor, loaded.model.config))
    chat.ask("Hello")
    assert seen[1].count(-200) == 1


def test_images_of_llava_16_are_counted(chat, loaded):
    config, side = loaded.model.config, 48
    config.update({"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"})
    config.image_grid_pinpoints = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
    loaded.model.model.image_newline = torch.nn.Parameter(torch.zeros(config.hidden_size))
    for size, tiles, tokens in (((50, 100), 2, 9 + 6 * 4), ((90, 90), 4, 9 + 6 * 7)):  # a mark ends each row of patches
        chat.show(Image.new("RGB", size))
        assert chat.pixels.shape[:2] == (1, 1 + tiles) and chat.image_tokens == tokens
        assert chat.ask("What?")


def test_marks_around_the_image_where_the_checkpoint_has_them(chat, picture, loaded):

    loaded.model.config.mm_use_im_start_end = True
    chat.show(open_image(str(picture)))
    ids = chat._prompt([], "What?")[0].tolist()
    at = ids.index(-200)
    assert loaded.tokenizer.decode(ids[:at]).endswith("USER: <im_start>")
    assert loaded.tokenizer.decode(ids[at + 1 :]).startswith("<im_end>\nWhat?")


def test_plain_gives_the_caption_whatever_is_asked(loaded, picture, monkeypatch):

    chat = Chat(loaded, "plain", max_new_tokens=6, out=io.StringIO())
    seen = prompts_of(chat, monkeypatch)
    chat.show(open_image(str(picture)))
    assert chat.ask("") == chat.ask("What?") == stock_answer(loaded, "<image>", picture, 6)
    assert seen == [[1, -200], [1, -200]]  # what stage 1 trains: nothing before or after the image


def test_the_oldest_turns_go_when_the_context_is_full(loaded, picture, monkeypatch, capsys):

    loaded.model.config.tokenizer_model_max_length = 200  # LLaVA would cut the question off there
    chat = Chat(loaded, "v1", max_new_tokens=8, out=io.StringIO())
    assert chat.longest == 200
    chat.show(open_image(str(picture)))
    seen = prompts_of(chat, monkeypatch)
    for i in range(8):
        assert chat.ask(f"Is there a red circle in the image? {i}")
        tokens = seen[-1]
        assert len(tokens) + 8 <= 200 and tokens.count(-200) == 1  # the image moves to the oldest turn kept
        assert loaded.tokenizer.decode(tokens[tokens.index(-200) + 1 :]).rstrip().endswith(f"{i} ASSISTANT:")
    err = capsys.readouterr().err
    assert "oldest 1 turns are dropped" in err
    assert 0 < len(chat.turns) < 8 and chat.turns[-1][0].endswith("7")
    before = list(chat.turns)
    with pytest.raises(HaclError, match="the question has 1.* tokens, its image's included; allowed are 200"):
        chat.ask("red circle " * 500)
    assert chat.turns == before and chat.ask("Is there a red circle?")


def test_an_answer_ends_with_the_models_positions(loaded, capfd):

    loaded.model.config.max_position_embeddings = 400
    chat = Chat(loaded, "v1", max_new_tokens=10**6, out=io.StringIO())
    assert chat.longest == 300  # a quarter is kept for the answer
    chat.ask("Hello.")
    length = chat._prompt([], "Hello.").shape[1]
    assert chat.settings.max_new_tokens == 400 - length
    chat.ask("Hello again.")  # the long answer before it is dropped
    assert chat.turns[0][0] == "Hello again." and len(chat.turns) == 1


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_keeps_what_was_written(loaded, presses, capsys):

    class Out(io.StringIO):
        def write(self, text):
            super().write(text)
            if 20 < len(self.getvalue()) and not self.closed_once:
                self.closed_once = True
                for _ in range(presses):
                    signal.raise_signal(signal.SIGINT)

    Out.closed_once = False
    chat = Chat(loaded, "v1", max_new_tokens=200, out=Out())
    handler = signal.getsignal(signal.SIGINT)
    _do(chat, "What is there?")
    assert signal.getsignal(signal.SIGINT) is handler
    ((question, answer),) = chat.turns
    assert question == "What is there?" and 20 < len(answer) < 100 and chat.out.getvalue() == answer + "\n"
    assert capsys.readouterr().err == "(stopped)\n"
    chat.max_new_tokens = 4
    _do(chat, "And then?")
    assert len(chat.turns) == 2 and chat.turns[1][1] and not chat.stopped


def test_without_an_answer_a_turn_is_not_kept(chat):
    chat.settings.eos_token_id = list(range(len(chat.tokenizer)))  # whatever comes ends it
    chat.settings.suppress_tokens = list(range(3, len(chat.tokenizer)))
    assert chat.ask("Hello") == "" and chat.turns == []


def test_sampling_keeps_the_checkpoints_settings_and_greedy_does_not(loaded):

    greedy = Chat(loaded, "v1").settings
    assert greedy.do_sample is False and greedy.temperature != 0.9 and greedy.top_p != 0.6
    loaded.model.generation_config.top_p = 0.6
    chat = Chat(loaded, "v1", 0.3, 4, io.StringIO())
    assert chat.settings.do_sample is True and chat.settings.temperature == 0.3 and chat.settings.top_p == 0.6
    assert chat.ask("Hello")


def test_the_loop(chat, monkeypatch, capsys, picture, tmp_path):

    lines = iter(
        ["", "What?", f"/image '{picture}'", "What?", "/image nowhere.png", "More?", "/reset", "/help", "/foo"]
    )
    states = []

    def typed(prompt):
        states.append((len(chat.turns), chat.pixels is not None))
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", typed)
    assert _converse(chat, tmp_path / "missing.png") == 0
    expected = [(0, False)] * 2 + [(1, False), (0, True), (1, True), (1, True), (2, True)] + [(0, True)] * 3
    assert states == expected
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("cannot be opened (No such file or directory)") == 2 and "9 tokens" in err
    assert "/foo is no command." in err and err.count("/reset ") == 2

    def interrupted(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert _converse(chat, None) == 0
    monkeypatch.setattr("builtins.input", lambda prompt: "/quit")
    assert _converse(chat, None) == 0


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--conv", "vicuna"], "--conv is 'vicuna'; allowed are: chatml_direct, default, "),
        (["--device", "gpu"], "--device is 'gpu'; allowed on this machine: cpu"),
        (["--temperature", "-1"], "--temperature is -1.0; allowed are 0"),
        (["--temperature", "nan"], "--temperature is nan; allowed are 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0; allowed are 1 and more"),
        (["--question", " "], "--question is empty"),
        (["--question", "What?", "--image", "nowhere.png"], "nowhere.png: cannot be opened"),
        (["--question", "What?"], "nowhere: "),
    ],
)
def test_mistakes_are_one_line_before_anything_is_loaded(arguments, said, capsys):
    assert cli.main(["chat", "nowhere", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {said}") and err.count("\n") == 1


def test_one_question_and_what_is_said_beside_it(whole, picture, loaded, capsys):
    command = ["chat", str(whole), "--device", "cpu", "--image", str(picture), "--max-new-tokens", "5"]
    assert cli.main([*command, "--question", "What?"]) == 0
    out, err = capsys.readouterr()
    assert out == stock_answer(loaded, f"{SYSTEM} USER: <image>\nWhat? ASSISTANT:", picture, 5) + "\n"
    assert "llava-v1.5-mini on cpu, conversation template v1." in err and "caption" not in err
    assert cli.main([*command, "--question", "", "--conv", "plain"]) == 0
    out, err = capsys.readouterr()
    assert out == stock_answer(loaded, "<image>", picture, 5) + "\n"
    assert "template plain" in err and "the answer to an image is its caption" in err and "--conv v1" in err


def in_terminal(name):
    """In the command's process: a pseudo-terminal takes the place of its input and output."""
    os.environ["TERM"] = "dumb"
    slave = os.open(name, os.O_RDWR)
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    for stream in (0, 1, 2):
        os.dup2(slave, stream)
    sys.stdin, sys.stdout, sys.stderr = (open(i, mode, buffering=1) for i, mode in ((0, "r"), (1, "w"), (2, "w")))


class Terminal:
    """``hacl-llava chat`` in a pseudo-terminal of its own, where the byte 3 is Ctrl-C and 4 is Ctrl-D."""

    def __init__(self, folder, *arguments):
        self.master, slave = pty.openpty()
        command = ("chat", *arguments, "--device", "cpu")
        self.command = Command(folder, *command, prepare=(in_terminal, os.ttyname(slave)))
        self.text, end = "", time.time() + 100
        while not select.select([self.master], [], [], 0.1)[0]:  # then it has opened the other end
            assert time.time() < end and self.command.process.is_alive(), self.command.ends()
        os.close(slave)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.command.process.kill()
        self.command.process.join()
        os.close(self.master)

    def type(self, text):
        self.text = ""
        os.write(self.master, text.encode())

    def until(self, pattern, seconds=200):
        """Wait until what was written since the last `type` matches; return it."""
        end = time.time() + seconds
        while not re.search(pattern, self.text, re.S):
            assert time.time() < end, f"no {pattern!r} in {self.text[-2000:]!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    self.text += os.read(self.master, 4096).decode(errors="replace").replace("\r\n", "\n")
                except OSError:
                    raise AssertionError(f"it ended without {pattern!r}: {self.text[-2000:]!r}") from None
        return self.text

    def ends(self):
        return self.command.ends(timeout=100)[0]


@pytest.mark.once
@pytest.mark.e2e
def test_in_a_terminal_ctrl_c_stops_an_answer_and_the_conversation_goes_on(whole, picture, tmp_path):
    with Terminal(tmp_path, whole, "--image", picture, "--max-new-tokens", LONG) as terminal:
        terminal.until(r"9 tokens.*\n> $")
        terminal.type("What is in it?\n")
        terminal.until(r"in it\?\n.{60}")
        assert "> " not in terminal.text  # the answer goes on
        terminal.type("\x03")
        stopped = terminal.until(r"\(stopped\)\n> $")
        assert len(stopped) < 2000  # LONG tokens would be more
        terminal.type("/image nowhere.png\n")
        terminal.until(r"error: nowhere.png: cannot be opened \(No such file or directory\).*\n> $")
        terminal.type("\x1b[A\x1b[A\n")  # twice up: the first question again
        terminal.until(r"What is in it\?[ \b]*\n.{60}")
        terminal.type("\x03")
        assert "Traceback" not in terminal.until(r"\(stopped\)\n> $")
        terminal.type("/reset\n")
        terminal.until(r"starts anew.*\n> $")
        terminal.type("\x04")
        assert terminal.ends() == 0


@pytest.mark.e2e
def test_in_a_terminal_a_short_answer_then_ctrl_c_at_the_prompt(whole, picture, loaded, tmp_path):
    with Terminal(tmp_path, whole, "--max-new-tokens", 6) as terminal:
        terminal.until(r"\n> $")
        terminal.type(f"/image {picture}\n")
        terminal.until(r"9 tokens.*\n> $")
        terminal.type("What?\n")
        answer = stock_answer(loaded, f"{SYSTEM} USER: <image>\nWhat? ASSISTANT:", picture, 6)
        assert terminal.until(r"\n> $") == f"What?\n{answer}\n> "
        time.sleep(0.5)  # until it reads: Python notices a Ctrl-C that comes before that at the next key alone
        terminal.type("\x03")
        assert terminal.ends() == 0


@pytest.mark.once
@pytest.mark.e2e
def test_a_question_is_answered_on_stdout_as_it_comes(whole, picture, loaded):
    command = [sys.executable, "-m", "hacl_llava.cli", "chat", whole, "--image", picture, "--device", "cpu"]
    command = [str(x) for x in (*command, "--question", "What is there?", "--max-new-tokens", 400)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    pieces, times = [], []
    while piece := os.read(process.stdout.fileno(), 65536):
        pieces.append(piece)
        times.append(time.monotonic())
    err = process.communicate()[1].decode()
    assert process.returncode == 0, err
    began = time.monotonic()
    answer = stock_answer(loaded, f"{SYSTEM} USER: <image>\nWhat is there? ASSISTANT:", picture, 400)
    takes = time.monotonic() - began
    said = b"".join(pieces).decode()
    # Its beginning: sooner or later two of a random model's tokens are as likely, and a process rounds otherwise.
    assert said[:60] == answer[:60] and len(said) > 2000 * 400 // LONG and said.endswith("\n")
    # Held back to the end, it would come in one; and it came over a good part of the time that an answer takes.
    assert len(pieces) > 50 and times[-1] - times[0] > takes / 5
    assert "do_sample" not in err and "temperature" not in err and "conversation template v1" in err


@pytest.mark.e2e
def test_ctrl_c_ends_a_question_with_130(whole, picture, tmp_path):
    with Terminal(
        tmp_path, whole, "--image", picture, "--question", "What is there?", "--max-new-tokens", LONG
    ) as terminal:
        terminal.until(r"template v1\.\n.{60}")
        terminal.type("\x03")
        assert "Traceback" not in terminal.until("stopped.")
        assert terminal.ends() == 130


@pytest.mark.e2e
def test_a_stage_one_projector_gives_captions(mini, whole, picture, tmp_path):
    model, _ = load(mini, stock=True)
    folder = tmp_path / "llava-hacl-pretrain"
    folder.mkdir()
    model.config.update({"tune_mm_mlp_adapter": True})
    model.config.save_pretrained(folder)
    projector = {f"model.mm_projector.{n}": p for n, p in model.get_model().mm_projector.state_dict().items()}
    torch.save(projector, folder / "mm_projector.bin")
    with Terminal(tmp_path, folder, "--base", mini.llm, "--image", picture, "--max-new-tokens", 6) as terminal:
        assert "template plain" in terminal.until(r"Press Enter for its caption\.\n> $")
        terminal.type("\n")
        assert len(terminal.until(r"\n.*\n> $")) > 4
        terminal.type("/quit\n")
        assert terminal.ends() == 0


def test_the_plain_prompt_begins_as_in_stage_one(mini, tmp_path):
    """With BOS after HACL's stage 1, also for a tokenizer that adds none; stock LLaVA trains without it there."""
    import transformers
    from conftest import make_llm_of_today
    from llava.conversation import conv_templates

    from hacl_llava.checkpoints.prompts import prompt_ids

    folder = make_llm_of_today(mini, tmp_path / "llm")
    for path, stock in ((folder, [-200]), (mini.llm, [1, -200])):
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(path), use_fast=False)
        for hacl, want in ((None, stock), ({"weight": 1.0}, [tokenizer.bos_token_id, -200])):
            config = types.SimpleNamespace(hacl=hacl)
            assert prompt_ids([("What?", None)], conv_templates["plain"], tokenizer, config)[0].tolist() == want
