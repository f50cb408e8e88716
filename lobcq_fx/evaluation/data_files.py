"""Questions, texts and sentence pairs from files, each line checked: an error names file, line, field and remedy."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lobcq_fx.errors import DataError
from lobcq_fx.evaluation.multiple_choice import Question
from lobcq_fx.evaluation.sts import SentencePair


@dataclass(frozen=True)
class Line:
    """A line of a file, and where it stands."""

    text: str
    place: str

    def refuse(self, what: str) -> DataError:
        """An error about this line."""
        return DataError(f"{self.place}: {what}")


def whole_text(path: Path) -> str:
    """What a text file holds.

    Raises:
        DataError: the file is missing, not UTF-8, or empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text: convert it first") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if not text.strip():
        raise DataError(f"{path} is empty")
    return text


def questions(path: Path) -> list[Question]:
    """Of JSON lines: {"context" or "question", "choices", "answer"}.

    A context stands as it is before the choices; a question becomes "Question: ...\\nAnswer:", as
    lm-evaluation-harness asks those of ARC. An answer is a place among the choices, from 0, or a letter, from A.

    Raises:
        DataError: names file, line, field and remedy.
    """
    return [_question(line, _record(line)) for line in _lines(path)]


def last_word_texts(path: Path) -> list[str]:
    """Of JSON lines, {"text"}, where the file's name ends in .jsonl or .json; else a text a line.

    Raises:
        DataError: names file, line, field and remedy.
    """
    as_json = path.suffix in (".jsonl", ".json")
    return [
        _last_word_text(line, _text(line, _record(line), "text") if as_json else line.text) for line in _lines(path)
    ]


def sentence_pairs(path: Path) -> list[SentencePair]:
    """Of JSON lines, {"sentence1", "sentence2", "score"}, where the file's name ends in .jsonl or .json.

    Else of the STS Benchmark's lines: at least seven columns between tabs, of which the fifth is the score, the sixth
    and seventh the sentences.

    Raises:
        DataError: names file, line, field and remedy.
    """
    pair = _json_pair if _holds_json(path) else _tabbed_pair
    found = [pair(line) for line in _lines(path)]
    if len({one.score for one in found}) < 2:
        raise DataError(f"{path}: all pairs have the same score: there is nothing to rank")
    return found


def _holds_json(path: Path) -> bool:
    return path.suffix in (".jsonl", ".json")


def _lines(path: Path) -> list[Line]:
    """Those that are not empty."""
    # Not splitlines: JSON strings may hold what it takes for the end of a line.
    numbered = enumerate(whole_text(path).split("\n"), 1)
    return [Line(line.rstrip("\r"), f"{path}, line {number}") for number, line in numbered if line.strip()]


def _record(line: Line) -> dict[str, Any]:
    try:
        values = json.loads(line.text)
    except ValueError as error:
        raise line.refuse(f"not JSON ({error}): write one object a line") from None
    if not isinstance(values, dict):
        raise line.refuse(f"a JSON {type(values).__name__}: write one object a line")
    return values


def _text(line: Line, values: dict[str, Any], field: str) -> str:
    found = values.get(field)
    if not isinstance(found, str) or not found.strip():
        there = "is missing" if field not in values else f"is {found!r}"
        raise line.refuse(f"field {field!r} {there}: give it a text (found: {', '.join(values) or 'no fields'})")
    return found


def _question(line: Line, values: dict[str, Any]) -> Question:
    if "question" in values and "context" in values:
        raise line.refuse("has both 'context' and 'question': keep one of them")
    if "question" in values:
        context = f"Question: {_text(line, values, 'question')}\nAnswer:"
    else:
        context = _text(line, values, "context")
    choices = values.get("choices")
    whole = isinstance(choices, list) and all(isinstance(one, str) and one.strip() for one in choices)
    if not isinstance(choices, list) or not whole or len(choices) < 2:
        raise line.refuse(f"field 'choices' is {choices!r}: give it a list of at least two texts")
    return Question(context, tuple(choices), _answer(line, values.get("answer"), len(choices)))


def _answer(line: Line, given: Any, choices: int) -> int:
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:choices]
    if isinstance(given, str) and len(given) == 1 and given in letters:
        return letters.index(given)
    if type(given) is int and 0 <= given < choices:
        return given
    raise line.refuse(
        f"field 'answer' is {given!r}: give the right choice's place, from 0 to {choices - 1}, or a letter from A to"
        f" {letters[-1]}"
    )


def _last_word_text(line: Line, text: str) -> str:
    stripped = text.strip()
    if " " not in stripped:
        raise line.refuse(f"the text {stripped[:40]!r} is one word: there is nothing to predict it from")
    return stripped


def _json_pair(line: Line) -> SentencePair:
    values = _record(line)
    score = _score(line, "field 'score'", values.get("score"))
    return SentencePair(_text(line, values, "sentence1"), _text(line, values, "sentence2"), score)


def _tabbed_pair(line: Line) -> SentencePair:
    columns = line.text.split("\t")
    if len(columns) < 7:
        raise line.refuse(
            f"{len(columns)} columns between tabs: the STS Benchmark has seven or more, score and sentences in the"
            " fifth to seventh; write JSON lines into a .jsonl file otherwise"
        )
    score = _score(line, "the fifth column, the score,", columns[4])
    if not columns[5].strip() or not columns[6].strip():
        raise line.refuse("the sixth or the seventh column, a sentence, is empty: give it a text")
    return SentencePair(columns[5], columns[6], score)


def _score(line: Line, name: str, given: Any) -> float:
    try:
        score = float(given)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise line.refuse(f"{name} is {given!r}: give a number")
    return score
