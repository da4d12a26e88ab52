"""A SentencePiece model, such as umT5's `spiece.model`, as the contents of a `tokenizer.json`.

ComfyUI's umT5 file has the tokenizer as this model only, in a tensor of bytes. The format is the protocol buffer of
sentencepiece_model.proto; the few fields that a Unigram model needs are read here. What they become is what
transformers makes of the same model (`SpmConverter` in convert_slow_tokenizer.py).
"""

import base64
import json
import struct
from collections.abc import Iterator

from avd_jax.errors import UserError

# Numbers of the fields in sentencepiece_model.proto.
_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _KIND = 1, 2, 3  # of a piece
_MODEL_TYPE, _BYTE_FALLBACK, _UNK_ID = 3, 35, 40  # of the trainer
_CHARSMAP = 2  # of the normalizer
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # kinds of a piece; 1 is the usual one
_UNIGRAM = 1
_END = "</s>"


def tokenizer_json(model: bytes, *, name: str) -> bytes:
    """Return the contents of the `tokenizer.json` of a SentencePiece model.

    Args:
      model: the file's contents.
      name: what messages call it, usually its path.

    Raises:
      UserError: it is no such model, or not a Unigram one that ends texts with </s>, as umT5's does.
    """
    pieces, unk_id, model_type, byte_fallback, charsmap = [], 0, _UNIGRAM, False, b""
    try:
        for number, value in _fields(model):
            if number == _PIECE:
                piece = dict(_fields(value))
                score = struct.unpack("<f", piece.get(_SCORE, b"\0\0\0\0"))[0]
                pieces.append((piece[_TEXT].decode(), score, piece.get(_KIND, 1)))
            elif number == _TRAINER:
                trainer = dict(_fields(value))
                unk_id = trainer.get(_UNK_ID, 0)
                model_type = trainer.get(_MODEL_TYPE, _UNIGRAM)
                byte_fallback = bool(trainer.get(_BYTE_FALLBACK, 0))
            elif number == _NORMALIZER:
                charsmap = dict(_fields(value)).get(_CHARSMAP, b"")
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, struct.error):
        raise UserError(f"{name}: no SentencePiece model; download it again") from None
    ids = {text: i for i, (text, _, _) in enumerate(pieces)}
    if model_type != _UNIGRAM or _END not in ids:
        raise UserError(f"{name}: not umT5's tokenizer: it must be a Unigram model with {_END}")
    special = {_UNKNOWN: True, _CONTROL: True, _USER_DEFINED: False}
    added = [(i, text, special[kind]) for i, (text, _, kind) in enumerate(pieces) if kind in special]
    normalizers = [{"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]
    if charsmap:
        encoded = base64.b64encode(charsmap).decode()
        normalizers.insert(0, {"type": "Precompiled", "precompiled_charsmap": encoded})
    spaces = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    text, end = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": _END, "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 0}}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": text, "special": special}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for i, text, special in added
        ],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": spaces,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [text, end],
            "pair": [text, end, second, end],
            "special_tokens": {_END: {"id": _END, "ids": [ids[_END]], "tokens": [_END]}},
        },
        "decoder": spaces,
        "model": {
            "type": "Unigram",
            "unk_id": unk_id,
            "vocab": [[text, score] for text, score, _ in pieces],
            "byte_fallback": byte_fallback,
        },
    }
    return json.dumps(content, ensure_ascii=False).encode()


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (number, value) of the fields of a protocol buffer; of lengths and fixed sizes the bytes."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire == 2:
            size, position = _varint(message, position)
        else:
            size = {1: 8, 5: 4}[wire]
        if position + size > len(message):
            raise IndexError("a field reaches beyond its message")
        yield number, message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """Return (number, the position behind it)."""
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, position
