"""Evidence: evaluation on the field's benchmarks, pictures of representations, and a report of both.

A benchmark (`pope`, `chair`, `amber`, `mmhal`) reads `Question` items and scores answers into counts, whose sums give
every metric; `engine` asks for what is missing, through `answers` (a checkpoint) or `endpoint`, and scores it;
`analyze` looks at representations; `report` puts runs side by side.
"""

from typing import NamedTuple


class Question(NamedTuple):
    """One thing asked about one image.

    ``id``: unique within its task. ``image``: path relative to the image folder. ``text``: what is asked, without the
    image token. ``facts``: what the task scores the answer by (``{"label": "yes"}``).
    """

    id: str
    image: str
    text: str
    facts: dict
