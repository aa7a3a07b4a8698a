"""Words as numbers: a SentencePiece model, one's own or any other, and the ids that open, close and fill a row.

In: strings. Out: rows of token ids with a mask. A row is [bos] pieces [eos] and padding; what was too long lost its
last pieces, never eos. A text that is None or blank makes a row without a valid token: a sample without words.

Where a model has no id for pad, bos or eos, one is reserved beyond its pieces; `size` counts them. A model without a
single capital letter is taken for uncased: texts are lower-cased for it, and accents taken off where it has none.
"""

import hashlib
import io
import itertools
import json
import os
import pathlib
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import sentencepiece
from jaxtyping import Bool, Int32
from numpy.typing import ArrayLike

from skyjax.errors import BadRecord, UserError
from skyjax.input.captions import captions
from skyjax.input.records import DESCRIPTION, RecordSource

FILE = "tokenizer.model"  # its name in the directory of a run

# What a model may call its special pieces where it does not say which they are.
_PIECES = {
    "pad": ("<pad>", "[PAD]"),
    "bos": ("<s>", "<bos>", "[CLS]"),
    "eos": ("</s>", "<eos>", "[SEP]"),
}
_TEXT_KEYS = frozenset({"answer", "caption", "captions", "question", "raw", "text", "texts"})
_LABEL_CAPTIONS = 8  # of a sample without texts, when a tokenizer is trained on records


class Tokenizer:
    """A SentencePiece model and the rules above.

    Attributes:
      size: ids that may occur, reserved ones included: the rows that a table of tokens needs.
      pad, bos, eos: ids of padding, of a row's first and of its last token.
      digest: SHA-256 of the file; two tokenizers of one digest are the same.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Reads the file.

        Raises:
          UserError: it is missing, or not a SentencePiece model.
        """
        self.path = pathlib.Path(path)
        try:
            self._model = self.path.read_bytes()
        except OSError as error:
            raise UserError(
                f'tokenizer: "{path}" cannot be read: {error.strerror}; train one with skyjax data tokenizer'
            ) from error
        self._pieces = _load(self._model, str(path))
        self.digest = hashlib.sha256(self._model).hexdigest()
        self.size = self._pieces.vocab_size()
        self.pad, self.bos, self.eos = (self._special(name) for name in ("pad", "bos", "eos"))
        words = "".join(map(self._pieces.id_to_piece, filter(self._is_word, range(self._pieces.vocab_size()))))
        self._uncased = words == words.lower()
        self._plain = self._uncased and words == _without_accents(words)

    def encode(
        self, texts: Sequence[str | None], length: int
    ) -> tuple[Int32[np.ndarray, "b n"], Bool[np.ndarray, "b n"]]:
        """Token ids of texts, and which of them are there; the others are `pad`.

        Args:
          texts: one a row.
          length: tokens a row, 3 or more.
        """
        self._check(length)
        return self._rows([self._row(self._ids(text)[: length - 2]) for text in texts], length)

    def encode_pairs(
        self, questions: Sequence[str], answers: Sequence[str | None], length: int
    ) -> tuple[Int32[np.ndarray, "b n"], Bool[np.ndarray, "b n"], Bool[np.ndarray, "b n"]]:
        """Rows [bos] question [eos] answer [eos] for a decoder that answers.

        Args:
          questions: one a row; too long a question loses its last pieces.
          answers: likewise, of which length - 3 pieces fit; None: not known, and the row ends behind the question.
          length: tokens a row, 3 or more.

        Returns:
          Ids, which of them are there, and which are of the answer, its eos included: what a loss counts.
        """
        self._check(length)
        rows, starts = [], []
        for question, answer in zip(questions, answers, strict=True):
            told = [] if answer is None else [*self._ids(answer)[: length - 3], self.eos]
            row = [self.bos, *self._ids(question)[: length - 2 - len(told)], self.eos]
            rows.append(row + told)
            starts.append(len(row))
        tokens, valid = self._rows(rows, length)
        return tokens, valid, valid & (np.arange(length) >= np.array(starts).reshape(-1, 1))

    def decode(self, tokens: ArrayLike, valid: ArrayLike | None = None) -> list[str]:
        """The text of each row up to its first eos, without special tokens.

        Args:
          tokens: ids (b, n), of numpy or jax.
          valid: those to read (b, n); None: all.
        """
        texts = []
        for number, row in enumerate(np.asarray(tokens)):
            ids = (row if valid is None else row[np.asarray(valid)[number]]).tolist()
            ids = ids[: ids.index(self.eos)] if self.eos in ids else ids
            plain = [i for i in ids if i not in (self.pad, self.bos) and 0 <= i < self._pieces.vocab_size()]
            texts.append(self._pieces.decode(plain))
        return texts

    def split(self, tokens: ArrayLike) -> list[tuple[str, list[int]]]:
        """The words of a row of ids, and the places of each word's pieces; special tokens are no words."""
        row, places = np.asarray(tokens), list[list[int]]()
        for place, number in enumerate(row.tolist()):
            if number in (self.pad, self.bos, self.eos) or not 0 <= number < self._pieces.vocab_size():
                continue
            if not places or self._pieces.id_to_piece(number).startswith("\u2581"):  # what stands for a space
                places.append([])
            places[-1].append(place)
        return [(self.decode(row[None, own])[0], own) for own in places]

    @property
    def rules(self) -> dict[str, Any]:
        """What the file does not tell: ids that open, close and fill a row, and how texts are folded before."""
        ids = {"bos": self.bos, "eos": self.eos, "pad": self.pad}
        return {**ids, "lower_case": self._uncased, "strip_accents": self._plain}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model as it was read, so that it can travel with what was trained on it."""
        pathlib.Path(path).write_bytes(self._model)

    def _special(self, name: str) -> int:
        """The model's own id, that of a piece with a usual name, or a new one."""
        own = getattr(self._pieces, f"{name}_id")()
        if own >= 0:
            return own
        for piece in _PIECES[name]:
            known = self._pieces.piece_to_id(piece)
            if known != self._pieces.unk_id():
                return known
        self.size += 1
        return self.size - 1

    def _is_word(self, number: int) -> bool:
        model = self._pieces
        return not (model.is_control(number) or model.is_unknown(number) or model.is_byte(number))

    def _ids(self, text: str | None) -> list[int]:
        text = text or ""
        if self._uncased:
            text = text.lower()
        return self._pieces.encode(_without_accents(text) if self._plain else text)

    def _row(self, ids: list[int]) -> list[int]:
        return [self.bos, *ids, self.eos] if ids else []

    def _rows(self, rows: list[list[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
        valid = np.arange(length) < np.array([len(row) for row in rows], int).reshape(-1, 1)
        tokens = np.full(valid.shape, self.pad, np.int32)
        tokens[valid] = np.array([i for row in rows for i in row], np.int32)
        return tokens, valid

    def _check(self, length: int) -> None:
        if length < 3:
            raise UserError(f"tokenizer: a length of {length} holds no word between bos and eos; set it to 3 or more")


def train_tokenizer(
    inputs: Iterable[str | os.PathLike[str]],
    size: int,
    out: str | os.PathLike[str],
    *,
    lower_case: bool = False,
) -> Tokenizer:
    """Trains a unigram model with byte fallback: the same bytes from the same texts, and every text comes back.

    Args:
      inputs: files and folders of records, as `read_texts` takes them.
      size: pieces wanted, 256 bytes and 4 special ones included; few texts give fewer.
      out: the file to write.
      lower_case: fold letters, so that one piece stands for both cases.

    Raises:
      UserError: there is no text, the size is too small, or the file cannot be written.
    """
    texts = [text for path in inputs for text in read_texts(path) if text.strip()]
    if not texts:
        raise UserError("tokenizer: the input holds no text; name files with a text a line, or records with captions")
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=written,
            vocab_size=size,
            model_type="unigram",
            normalization_rule_name="nmt_nfkc_cf" if lower_case else "nmt_nfkc",
            byte_fallback=True,
            split_digits=True,  # counts: 117 and 118 share what they have in common
            character_coverage=1.0,
            hard_vocab_limit=False,
            shuffle_input_sentence=False,
            num_threads=1,  # the order of sums is that of the threads
            max_sentence_length=1 << 16,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"tokenizer: {size} pieces cannot be made of {len(texts):,} texts: {error}; ask for another --vocab-size"
        ) from error
    path = pathlib.Path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(written.getvalue())
    except OSError as error:
        raise UserError(f'tokenizer: "{out}" cannot be written: {error.strerror}; name another file') from error
    return Tokenizer(path)


def read_texts(path: str | os.PathLike[str]) -> Iterator[str]:
    """Texts of one file or folder, in order.

    A folder of records gives the captions of its samples, their questions and answers, and where a sample has no
    caption those that its labels and questions make (input/captions.py). Of .json and .jsonl files come the strings
    below the keys raw, caption, text, question and answer, however deep; other files have a text a line.

    Raises:
      UserError: the file is missing, not UTF-8 or not JSON; or the folder holds no records.
    """
    path = pathlib.Path(path)
    if path.is_dir() or path.name == DESCRIPTION:
        yield from _record_texts(path if path.is_dir() else path.parent)
        return
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            yield from _strings(json.loads(text))
        elif path.suffix == ".jsonl":
            for line in filter(str.strip, text.splitlines()):
                yield from _strings(json.loads(line))
        else:
            yield from text.splitlines()
    except OSError as error:
        raise UserError(f'tokenizer: "{path}" cannot be read: {error.strerror}') from error
    except ValueError as error:
        raise UserError(f'tokenizer: "{path}" is not the text that its name says: {error}') from error


def _record_texts(folder: pathlib.Path) -> Iterator[str]:
    source = RecordSource(folder)
    names = source.description.get("label_names", {})
    for i in range(len(source)):
        try:
            sample = source[i]
        except BadRecord:
            continue  # training tells of it; a tokenizer is the same without one text
        told = [text for text in sample.texts if "\t" not in text]
        asked = [text.split("\t")[-2:] for text in sample.texts if "\t" in text]
        pairs = [(question, answer) for question, answer in asked]
        yield from itertools.chain(told, *pairs)
        if not told:
            yield from captions(sample, names, seed=0, number=_LABEL_CAPTIONS, questions=pairs)


def _strings(value: Any, wanted: bool = False) -> Iterator[str]:
    """Strings below the keys that captions and questions go by."""
    if isinstance(value, str):
        if wanted:
            yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(inner, key in _TEXT_KEYS)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, wanted)


def _load(model: bytes, name: str) -> Any:
    # SentencePiece takes no bytes at all for a model, and says so on stderr later.
    try:
        if model:
            return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError:
        pass
    raise UserError(f'tokenizer: "{name}" is not a SentencePiece model; train one with skyjax data tokenizer')


def _without_accents(text: str) -> str:
    apart = unicodedata.normalize("NFD", text)
    return unicodedata.normalize("NFC", "".join(letter for letter in apart if not unicodedata.combining(letter)))
