"""Examples, kept compactly."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence

from nrt_fast.data.order import permutation
from nrt_fast.types import Example, UserError

HELDOUT_KEY = 0x4E5254
"""Keeps the held-out split apart from the permutations of the training order."""


class Examples(Sequence[Example]):
    """Examples in file order. Ids are kept as int32: Python's lists of integers take nine times the memory."""

    def __init__(self, examples: Iterable[Example] = ()):
        self._rows: list[tuple] = []
        self.extend(examples)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        uid, prompt_ids, answer_ids, *rest = self._rows[index]
        return Example(uid, prompt_ids.tolist(), answer_ids.tolist(), *rest)

    def extend(self, examples: Iterable[Example]) -> None:
        """Append examples."""
        for e in examples:
            ids = array("i", e.prompt_ids), array("i", e.answer_ids)
            self._rows.append((e.uid, *ids, e.hard_positions, e.question, e.answer, e.where, e.aliases))

    def prompts(self) -> Iterator[bytes]:
        """Each prompt's ids, to be compared."""
        return (row[1].tobytes() for row in self._rows)

    def sha256(self) -> str:
        """Hash of what is trained on: the ids of every prompt and answer, and where each ends."""
        digest = hashlib.sha256()
        for _, *parts in (row[:3] for row in self._rows):
            digest.update(array("i", map(len, parts)))
            for ids in parts:
                digest.update(ids)
        return digest.hexdigest()

    @classmethod
    def join(cls, parts: Iterable["Examples"]) -> "Examples":
        """The examples of all parts, one after another, sharing their storage."""
        joined = cls()
        joined._rows = [row for part in parts for row in part._rows]
        return joined

    def select(self, indices: Iterable[int]) -> "Examples":
        """The examples at these indices, sharing their storage."""
        selected = Examples()
        selected._rows = [self._rows[index] for index in indices]
        return selected


def derive_num_heldout(num_wanted: int, num_rows: int) -> int:
    """Rows to hold out where nobody said how many: those wanted, but of few rows a tenth, and one at least."""
    return min(num_wanted, max(1, num_rows // 10))


def split_heldout(num_rows: int, num_heldout: int, seed: int) -> tuple[list[int], list[int]]:
    """Set the last num_heldout rows of a seeded shuffle aside.

    Returns:
        Indices of the rows that stay, in order, and of those set aside, as shuffled.

    Raises:
        UserError: none would stay.
    """
    if num_heldout >= num_rows:
        raise UserError(
            f"num_eval_prompts: {num_heldout} rows are to be held out, but there are only {num_rows} to train on; "
            f"valid: at most {num_rows - 1}, or an eval_dataset_name"
        )
    shuffled = permutation(num_rows, seed, HELDOUT_KEY).tolist()
    return sorted(shuffled[: num_rows - num_heldout]), shuffled[num_rows - num_heldout :]
