"""``lmms-eval --model hacl_llava``: lmms-eval's benchmarks on every checkpoint that `load_pretrained` takes.

For what to use it, and for what not: docs/evaluation.md. lmms-eval (0.6.1 and newer) finds `manifest` through the entry
point group ``lmms_eval.models``, whatever model is asked for: LLaVA is imported only when this one is made.
"""

import os
from typing import TYPE_CHECKING, Any, NoReturn

from lmms_eval.api.model import lmms
from tqdm import tqdm

from ..config import HaclError
from . import Question

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance
    from lmms_eval.models.registry_v2 import ModelManifest

MAX_NEW_TOKENS = 1024  # where a task says nothing, as lmms-eval's own LLaVA has it


def manifest() -> "ModelManifest":
    """What the entry point gives lmms-eval: the name of the model, and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="hacl_llava", simple_class_path=f"{__name__}.HaclLlava")


class HaclLlava(lmms):
    """A checkpoint that answers lmms-eval's requests: one image each, greedily, in batches whose rows are not padded.

    Args:
        pretrained, base: as for `load_pretrained`. conv_template: a name of ``llava.conversation.conv_templates``;
            None: the one that the checkpoint was trained with, as far as its kind and names tell. batch_size: requests
            at a time. settings: the others of `load_pretrained` (device, dtype, bits, ...); with several processes
            (``accelerate launch``) each takes the GPU of its local rank unless ``device`` is given.

    Raises:
        HaclError: a setting or the checkpoint cannot be used. TypeError: there is no such setting.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike,
        base: str | os.PathLike | None = None,
        conv_template: str | None = None,
        batch_size: int | str = 1,
        **settings: Any,
    ) -> None:
        super().__init__()
        import torch

        from ..checkpoints.load import load_pretrained
        from ..checkpoints.prompts import default_template
        from .answers import Answerer

        # isort: split
        from llava.conversation import conv_templates

        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise HaclError(f"--batch_size is {batch_size!r}; allowed are 1 and more ('auto' is not).")
        if conv_template not in (None, *conv_templates):
            raise HaclError(f"conv_template is {conv_template!r}; allowed are: {', '.join(sorted(conv_templates))}.")
        if settings.get("device") is None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            settings["device"] = gpu if torch.cuda.is_available() else "cpu"
        loaded = load_pretrained(pretrained, base, **settings)
        template = conv_template or default_template(pretrained, base, loaded.model.config, loaded.tokenizer)
        self.answerer = Answerer(loaded, template, int(batch_size), workers=0)
        self.device = loaded.model.device

    def generate_until(self, requests: "list[Instance]") -> list[str]:
        """Answer requests; ``until`` is passed over, as lmms-eval's own LLaVA does.

        Args:
            requests: lmms-eval's ``Instance`` objects, whose ``args`` are (question, generation settings, function of a
                document to its images, number of the document, task, split).

        Returns:
            A list of answers, in the requests' order.

        Raises:
            HaclError: a task samples or uses beams, asks about anything but one image, or a question is too long.
        """
        from llava.mm_utils import process_images

        asked = []
        for index, request in enumerate(requests):
            text, settings, _, doc, task, _ = request.args
            _check_greedy(settings, task)
            ids = self.answerer.prompt(Question(str(index), None, text, {}))
            asked.append((ids.shape[1], settings.get("max_new_tokens") or MAX_NEW_TOKENS, index, ids))
        asked.sort(key=lambda row: row[:2], reverse=True)  # rows of one length; the longest first: errors come at once

        def rows():  # images are read when their batch's turn comes
            for _, limit, index, ids in asked:
                _, _, images_of, doc, task, split = requests[index].args
                where, images = f"task {task}, document {doc}", images_of(self.task_dict[task][split][doc]) or []
                if len(images) != 1 or not hasattr(images[0], "convert"):
                    raise HaclError(
                        f"{where}: comes with {len(images)} images or with another medium; this model takes tasks of "
                        "one image per question."
                    )
                image = images[0].convert("RGB")
                pixels = process_images([image], self.answerer.image_processor, self.answerer.model.config)[0]
                try:
                    yield self.answerer.row(index, ids, pixels, image.size, limit)
                except HaclError as error:
                    raise HaclError(f"{where}: {error}") from None

        answers = [None] * len(requests)
        found = self.answerer.replies(rows())
        for answer in tqdm(found, total=len(requests), desc="hacl_llava", disable=self.rank != 0):
            answers[answer.question] = answer.text
        return answers

    def loglikelihood(self, requests: "list[Instance]") -> NoReturn:
        """Not there: ``NotImplementedError``."""
        task = requests[0].args[4]
        raise NotImplementedError(f"task {task} compares likelihoods; hacl_llava answers generate_until tasks alone.")

    def generate_until_multi_round(self, requests: "list[Instance]") -> NoReturn:
        """Not there: ``NotImplementedError``."""
        raise NotImplementedError("a task asks in rounds; hacl_llava answers generate_until tasks alone.")


def _check_greedy(settings, task):
    samples = settings.get("do_sample", bool(settings.get("temperature")))  # as generate() takes them
    if samples or (settings.get("num_beams") or 1) != 1:
        raise HaclError(
            f"task {task} samples or uses beams, and hacl_llava answers greedily; to have that, add: "
            "--gen_kwargs do_sample=False,num_beams=1"
        )
