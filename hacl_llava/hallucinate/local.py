"""The source ``local``: a Hugging Face causal LM on the user's own GPU(s), batched. Floor 2."""

from itertools import islice

from ..config import HaclError
from .prompts import Prompt, Work


class LocalSource:
    """Asks a causal LM with its chat template.

    Args:
        model: path or hub id. checker: refuses candidates. prompt: a `Prompt`. batch_size: captions at a time.
        attempts: how often a caption is asked for while candidates are missing. temperature: 0 takes the likeliest
        token. seed: of the sampling; the same batches give the same answers. trust_remote_code: run code that comes
        with the model.

    Raises:
        HaclError: the model cannot be loaded.
    """

    whole_blocks, stopped = False, None

    def __init__(
        self,
        model,
        checker,
        prompt=None,
        *,
        batch_size=16,
        attempts=3,
        temperature=1.0,
        max_output_tokens=None,
        seed=0,
        trust_remote_code=False,
    ):
        self.path, self.checker, self.prompt, self.batch_size = model, checker, prompt or Prompt(), batch_size
        self.attempts, self.temperature, self.max_output_tokens = attempts, temperature, max_output_tokens
        self.seed, self.trust_remote_code = seed, trust_remote_code
        self.model = None

    def _load(self):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            more = {"trust_remote_code": self.trust_remote_code}
            self.tokenizer = AutoTokenizer.from_pretrained(self.path, **more)
            if torch.cuda.is_available():
                more["device_map"] = "auto"
            self.model = AutoModelForCausalLM.from_pretrained(self.path, torch_dtype="auto", **more).eval()
        except (OSError, ValueError, ImportError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise HaclError(f"--local-model {self.path}: cannot be loaded ({first}).") from None
        self.tokenizer.padding_side = "left"  # so that every row's answer begins at one place
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def answers(self, items):
        """An `Answer` for each item, batch by batch."""
        items = iter(items)
        while batch := list(islice(items, self.batch_size)):
            yield from self._batch(batch)

    def _batch(self, items):
        todo = works = [Work(item) for item in items]
        for attempt in range(self.attempts):
            if not todo:
                break
            again = []
            for work, (text, used) in zip(todo, self._generate(todo, attempt), strict=True):
                work.usage.update(used)
                if not work.read(text, self.checker) and work.missing():
                    again.append(work)
            todo = again
        yield from (work.answer() for work in works)

    def _generate(self, works, attempt):
        """(text, tokens used) of each item's answer to what is still missing."""
        import torch

        if self.model is None:
            self._load()
        items = [work.item._replace(wanted=work.missing()) for work in works]
        avoid = [work.refused + [t for _, t in work.got] for work in works]
        prompts = [self._text(self.prompt.messages(i, a)) for i, a in zip(items, avoid, strict=True)]
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        longest = max(len(item.caption) * len(item.wanted) for item in items)
        settings = {"do_sample": False}
        if self.temperature > 0 or attempt:  # the likeliest answer has been refused: another one is needed
            settings = {"do_sample": True, "temperature": self.temperature or 1.0, "top_p": 0.95}
        torch.manual_seed(hash((self.seed, items[0].index, attempt)) % 2**31)
        with torch.inference_mode():
            output = self.model.generate(
                **inputs.to(self.model.device),
                max_new_tokens=self.max_output_tokens or 64 + longest // 2,
                pad_token_id=self.tokenizer.pad_token_id,
                **settings,
            )
        answers = output[:, inputs.input_ids.shape[1] :]
        for row, mask in zip(answers, inputs.attention_mask, strict=True):
            used = {"input": int(mask.sum()), "output": int((row != self.tokenizer.pad_token_id).sum())}
            yield self.tokenizer.decode(row, skip_special_tokens=True), used

    def _text(self, messages):
        if getattr(self.tokenizer, "chat_template", None):
            try:
                return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except Exception as error:  # jinja2's, whose text is the template's own
                if messages[0]["role"] != "system" or "system" not in str(error).lower():
                    raise HaclError(f"--local-model {self.path}: its chat template fails ({error}).") from None
                first = messages[1] | {"content": messages[0]["content"] + "\n\n" + messages[1]["content"]}
                return self._text([first, *messages[2:]])
        turns = [m["content"] if m["role"] == "system" else f"{m['role'].upper()}: {m['content']}" for m in messages]
        return (self.tokenizer.bos_token or "") + "\n\n".join([*turns, "ASSISTANT: "])
