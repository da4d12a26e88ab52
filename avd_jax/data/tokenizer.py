"""Text -> token ids, as Wan2.1 prepares prompts for umT5 (`wan/modules/tokenizers.py`, cleaning mode "whitespace")."""

import html
from collections.abc import Callable, Sequence
from pathlib import Path

import ftfy
import numpy as np
import tokenizers

from avd_jax.errors import UserError
from avd_jax.paths import any_path

TEXT_LENGTH = 512
_COUNTED_TOGETHER = 256  # few enough that their encodings fit into memory
TOKENIZER_FILE = "tokenizer.json"


def clean(text: str) -> str:
    """Repair broken encodings, resolve HTML entities (twice: `&amp;lt;` occurs), collapse white space and strip it."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


class Tokenizer:
    """umT5's tokenizer: `input_ids, attention_mask = tokenizer(["text"])`.

    Args:
      serialized: the contents of a `tokenizer.json`.
      name: what the messages call its source, usually its path.

    Raises:
      UserError: when the contents are no tokenizer, or not one that pads with `<pad>` and ends texts with `</s>`.
    """

    def __init__(self, serialized: bytes, *, name: str = TOKENIZER_FILE):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(serialized)
        except Exception as error:  # the library raises plain Exception for whatever it cannot parse
            raise UserError(f"{name}: not a readable tokenizer ({_one_line(error)}); download it again") from error
        self.serialized = serialized
        self._pad_id = self._tokenizer.token_to_id("<pad>")
        self._tokenizer.no_padding()  # the file may ask for its own; the length is ours
        self._tokenizer.no_truncation()  # done below, where what is lost can be counted
        end_id = self._tokenizer.token_to_id("</s>")
        if self._pad_id is None or end_id is None or self._tokenizer.encode("").ids != [end_id]:
            raise UserError(f"{name}: not umT5's tokenizer: it must have <pad> and end every text with </s>")

    @classmethod
    def from_path(cls, path: str | Path) -> "Tokenizer":
        """Read a tokenizer folder that holds `tokenizer.json`, or that file itself.

        Raises:
          UserError: when there is none, or it cannot be read as umT5's tokenizer.
        """
        path = any_path(path)
        file = path / TOKENIZER_FILE if path.is_dir() else path
        if not file.is_file():
            hint = ", which cannot be made from spiece.model here" if (path / "spiece.model").is_file() else ""
            raise UserError(f"{file}: no such file; a tokenizer folder must hold {TOKENIZER_FILE}{hint}")
        try:
            serialized = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from error
        return cls(serialized, name=str(file))

    @property
    def vocab_size(self) -> int:
        """Number of tokens; the encoder's embedding may have more rows."""
        return self._tokenizer.get_vocab_size()

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokenize cleaned texts.

        Args:
          texts: B texts; longer ones are cut to 512 tokens, of which `</s>` is the last.

        Returns:
          (input_ids, attention_mask), both int32 [B 512]; the mask is 1 for tokens and 0 for padding.

        Raises:
          UserError: when a single string is passed, or something in the list is not a string.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise UserError("the tokenizer takes a list of strings, one for each prompt")
        input_ids = np.full((len(texts), TEXT_LENGTH), self._pad_id, np.int32)
        attention_mask = np.zeros((len(texts), TEXT_LENGTH), np.int32)
        for row, encoding in enumerate(self._tokenizer.encode_batch([clean(text) for text in texts])):
            ids = encoding.ids
            if len(ids) > TEXT_LENGTH:
                ids = ids[: TEXT_LENGTH - 1] + ids[-1:]
            input_ids[row, : len(ids)] = ids
            attention_mask[row, : len(ids)] = 1
        return input_ids, attention_mask

    def tell_what_is_cut(
        self, texts: Sequence[str], limit: int = TEXT_LENGTH, note: Callable[[str], object] = print
    ) -> None:
        """Give `note` a line if some texts have more than `limit` tokens, or words that the tokenizer does not know."""
        texts, lengths, unknown = list(dict.fromkeys(texts)), {}, {}
        unk_id = self._tokenizer.token_to_id("<unk>")
        for first in range(0, len(texts), _COUNTED_TOGETHER):
            batch = texts[first : first + _COUNTED_TOGETHER]
            encodings = self._tokenizer.encode_batch([clean(text) for text in batch])
            for text, encoding in zip(batch, encodings, strict=True):
                ids = encoding.ids
                lengths[text] = len(ids)
                if unk_id in ids:
                    places = [place for token, place in zip(ids, encoding.offsets, strict=True) if token == unk_id]
                    unknown |= {clean(text)[start:end].strip(): None for start, end in places}
        longest = max(lengths, key=lengths.get, default="")
        if (length := lengths.get(longest, 0)) > limit:
            cut = sum(length > limit for length in lengths.values())
            others = f", the longest of {cut:,} such texts" if cut > 1 else ""
            note(
                f"cut off: {length - limit:,} of {length:,} tokens of '{clean(longest)[:60]}...'{others}; the model "
                f"reads the first {limit}"
            )
        if words := list(unknown):
            shown = ", ".join(map(repr, words[:5])) + (f" and {len(words) - 5:,} more" if len(words) > 5 else "")
            note(f"unknown to the tokenizer: {shown}, which the model does not read")

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer, byte for byte as it was read, to `folder/tokenizer.json`; makes the folder."""
        folder = any_path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TOKENIZER_FILE).write_bytes(self.serialized)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
