"""Questions about images, asked of a model behind an OpenAI-compatible endpoint."""

import base64
import io
import os
from collections.abc import Iterable, Iterator

from ..common.endpoint import Endpoint, NotAnswered
from ..common.images import image_file, open_image
from ..config import HaclError
from . import Question
from .journal import Answer

LARGEST_IMAGE = 10_000_000  # bytes sent as they are


class EndpointAnswerer:
    """Asks an endpoint, as `answers.Answerer` asks a checkpoint."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    def answers(
        self, questions: Iterable[Question], images: str | os.PathLike, max_new_tokens: int
    ) -> Iterator[Answer]:
        """Ask questions about images; as `Answerer.answers`, in the order in which answers come.

        Raises:
            HaclError: nothing more can be asked; answers of requests under way are yielded before.
        """

        def one(question):
            try:
                uri = data_uri(images, question.image)
            except HaclError as error:
                return Answer(question, error=str(error))
            content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": question.text}]
            return Answer(question, self.endpoint.ask([{"role": "user", "content": content}], max_new_tokens))

        for question, answer in self.endpoint.each(one, questions):
            yield Answer(question, error=str(answer)) if isinstance(answer, NotAnswered) else answer


def data_uri(folder: str | os.PathLike, name: str) -> str:
    """An image as a data URI: JPEG and PNG as they are unless they are huge, others as JPEG.

    Raises:
        HaclError: it cannot be read, or leads out of the folder.
    """
    from PIL import Image

    path = image_file(folder, name)
    image, data = open_image(path), path.read_bytes()  # a damaged one is seen here, not at the endpoint
    kind = Image.open(io.BytesIO(data)).format
    if kind not in ("JPEG", "PNG") or len(data) > LARGEST_IMAGE:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95)
        kind, data = "JPEG", buffer.getvalue()
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"
