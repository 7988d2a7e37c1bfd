"""The LLM's states of texts, kept on disk: while it is frozen they are constants, which several runs share.

One SQLite file in a folder, for one LLM in one precision. The key of a text is its token ids, int32, with those of the
suffix behind them, so that tokenizer, representation and prompt are in it; the value is its state, with a checksum.
Runs and ranks of a machine may use the file at the same time.

A file is read only after its LLM was compared with the one at hand: by a digest of weights, and by a few of its texts,
encoded anew.
"""

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor
from transformers.integrations import is_deepspeed_zero3_enabled

from .config import HaclError
from .fused import allowed_difference
from .packing import PackedTexts, pack, unpack
from .representation import llm_parameters, llm_trains

FILE = "text_states.sqlite"
PROBE = 4  # texts that are encoded anew to see whether a file is of this LLM
WAIT = 60  # seconds for another process to end its write
CHECKSUM = 8  # bytes behind each state
TABLES = """
CREATE TABLE IF NOT EXISTS llm (one INTEGER PRIMARY KEY, digest TEXT NOT NULL, dtype TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS states (ids BLOB PRIMARY KEY, state BLOB NOT NULL);
"""
Encode = Callable[[Any, PackedTexts], Tensor]


class TextCache:
    """States of texts in ``folder/text_states.sqlite``, made at first use.

    Attributes:
        read, computed: how many states came from the file, and how many from the LLM, so far in this process.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.file, self.read, self.computed = Path(folder) / FILE, 0, 0
        self._connection = self._digest = self._dtype = None  # dtype: that of the file, once it was compared

    def states(self, model: Any, packed: PackedTexts, encode: Encode) -> Tensor:
        """``[N, D]``, what ``encode(model, packed)`` gives, which runs for those texts alone that the file lacks.

        The host waits for the device, to see which texts they are. Where a text is missing (``end`` is -1) stand ones.

        Args:
            model: a `model.HaclMixin` whose LLM is frozen. encode: `fused.texts` or `representation.texts`.

        Raises:
            HaclError: the LLM trains, or is in parts; the file is of another LLM, damaged, or cannot be written.
        """
        if llm_trains(model) or is_deepspeed_zero3_enabled():
            # Under ZeRO-3 all ranks have to run the same passes, and lack different texts.
            raise HaclError(
                "--hacl_text_cache keeps the states of an LLM that is frozen and whole on each rank; here it trains or "
                "ZeRO-3 has it in parts: leave the flag out."
            )
        device = packed["ids"].device
        ids, lengths = unpack({name: x.cpu() for name, x in packed.items()})
        there = [end >= 0 for end in packed["end"].tolist()]
        texts = [ids[i, :n].int().numpy().tobytes() if there[i] else None for i, n in enumerate(lengths.tolist())]
        wanted = list(dict.fromkeys(filter(None, texts)))
        # An empty file is compared as soon as it holds something, whoever wrote it.
        known = self._look_up(wanted) if self._dtype or self._compare(model, encode, device) else {}
        self.read += len(known)
        if lacking := [text for text in wanted if text not in known]:
            new = _encode(model, lacking, encode, device)
            self._keep(lacking, new)
            self.computed += len(lacking)
            known |= zip(lacking, new)
        nothing = torch.ones_like(known[wanted[0]]) if wanted else torch.ones(model.config.hidden_size)
        return torch.stack([known.get(text, nothing) for text in texts]).to(device)

    def check(self, model: Any, encode: Encode, device: torch.device) -> None:
        """Raise now what `states` would of the file, for a run that asks for none yet: not hours later. Once."""
        if self._digest is None:
            self._compare(model, encode, device)

    def _look_up(self, texts):
        found = {}
        with self._database() as database:
            for text in texts:
                if row := database.execute("SELECT state FROM states WHERE ids = ?", (text,)).fetchone():
                    found[text] = self._state(text, row[0], self._dtype)
        return found

    def _state(self, text, value, dtype):
        state, checksum = value[:-CHECKSUM], value[-CHECKSUM:]
        if checksum != _checksum(text, state):
            raise HaclError(f"{self.file}: is damaged; remove it, and its states are computed anew.")
        return torch.frombuffer(bytearray(state), dtype=dtype)

    def _keep(self, texts, states):
        """Add states; what another process has added meanwhile stays."""
        rows = []
        for text, state in zip(texts, states):
            if torch.isfinite(state).all():
                value = _bytes(state)
                rows.append((text, value + _checksum(text, value)))
        own = self._digest, str(states.dtype).removeprefix("torch.")
        with self._database() as database, database:  # one transaction
            database.execute("INSERT OR IGNORE INTO llm VALUES (1, ?, ?)", own)
            self._refuse_another(database.execute("SELECT digest, dtype FROM llm").fetchone(), own)
            database.executemany("INSERT OR IGNORE INTO states VALUES (?, ?)", rows)

    def _compare(self, model, encode, device):
        """Whether the file holds something, of this very LLM; not of another."""
        self._digest = self._digest or digest(model)
        with self._database() as database:
            kept = database.execute("SELECT digest, dtype FROM llm").fetchone()
            probe = database.execute("SELECT ids, state FROM states ORDER BY rowid LIMIT ?", (PROBE,)).fetchall()
        if not kept or not probe:
            return False
        texts = [text for text, _ in probe]
        now = _encode(model, texts, encode, device)
        self._refuse_another(kept, (self._digest, str(now.dtype).removeprefix("torch.")))
        then = torch.stack([self._state(*row, now.dtype) for row in probe])
        found = ((now.float() - then.float()).norm(dim=1) / then.float().norm(dim=1)).max().item()
        if not found <= (allowed := allowed_difference(now.dtype)):
            self._refuse(f"its states differ from this LLM's by {found:.2g} (relative; allowed {allowed:g})")
        self._dtype = now.dtype
        return True

    def _refuse_another(self, kept, own):
        if kept[0] != own[0]:
            self._refuse("its states are of an LLM with other weights, or in another precision")
        if kept[1] != own[1]:
            self._refuse(f"its states are {kept[1]}, this LLM's are {own[1]}")

    def _refuse(self, why):
        raise HaclError(f"{self.file}: {why}; give --hacl_text_cache another folder, one for each LLM and precision.")

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """The connection; what SQLite says is raised as a `HaclError`."""
        try:
            if self._connection is None:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                # SQLite itself does not wait while another process changes the journal's mode.
                with FileLock(f"{self.file}.lock", timeout=WAIT):
                    connection = sqlite3.connect(self.file, timeout=WAIT, isolation_level="IMMEDIATE")
                    connection.execute("PRAGMA journal_mode = WAL")  # readers do not wait for who writes
                    connection.execute("PRAGMA synchronous = NORMAL")  # a lost power may cost the last states, no more
                    connection.executescript(TABLES)
                self._connection = connection
            yield self._connection
        except (sqlite3.Error, OSError) as error:
            raise HaclError(
                f"{self.file}: cannot be used ({error}); see to its disk, or remove it, and its states are computed "
                "anew, or give --hacl_text_cache another folder."
            ) from None

    def __str__(self) -> str:
        return f"{self.read:,} states of texts read from {self.file}, {self.computed:,} computed"


def digest(model: Any) -> str:
    """Of the LLM's weights: of up to 1,024 numbers of each parameter, spread over it."""
    found = blake2b(digest_size=16)
    for parameter in llm_parameters(model):
        part = parameter.detach().flatten()[:: max(1, parameter.numel() // 1024)]
        found.update(f"{tuple(parameter.shape)} {parameter.dtype}".encode() + _bytes(part.cpu()))
    return found.hexdigest()


def _encode(model, texts: Iterable[bytes], encode: Encode, device) -> Tensor:
    packed = pack([torch.frombuffer(bytearray(text), dtype=torch.int32).long() for text in texts])
    return encode(model, {name: x.to(device) for name, x in packed.items()}).cpu()


def _bytes(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _checksum(text, state):
    return blake2b(text + state, digest_size=CHECKSUM).digest()
