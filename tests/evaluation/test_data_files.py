from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lobcq_fx.errors import DataError
from lobcq_fx.evaluation import Question, SentencePair, last_word_texts, questions, sentence_pairs

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def file(content: str, name: str = "data.jsonl") -> Path:
        (tmp_path / name).write_text(content, encoding="utf-8")
        return tmp_path / name

    return file


def test_questions(write: Write) -> None:
    found = questions(
        write(
            '{"context": "Water is", "choices": ["wet", "dry"], "answer": 0}\r\n'
            "\n"
            '{"question": "Two\\u2028and two?", "choices": ["3", "4", "5"], "answer": "B", "id": 7}'
        )
    )
    assert found == [
        Question("Water is", ("wet", "dry"), 0),
        Question("Question: Two\u2028and two?\nAnswer:", ("3", "4", "5"), 1),
    ]


def test_texts_for_their_last_word(write: Write) -> None:
    assert last_word_texts(write('{"text": "one\\ntwo three "}\n')) == ["one\ntwo three"]
    assert last_word_texts(write("one two\n\nthree four five\n", "data.txt")) == ["one two", "three four five"]


def test_sentence_pairs(write: Write) -> None:
    tabbed = "main\tMSRvid\t2012\t1\t5.0\tA dog.\tThe dog.\textra\nmain\tMSRvid\t2012\t2\t1\tA dog.\tA cat.\n"
    expected = [SentencePair("A dog.", "The dog.", 5.0), SentencePair("A dog.", "A cat.", 1.0)]
    assert sentence_pairs(write(tabbed, "sts.csv")) == expected
    line = '{"sentence1": "A dog.", "sentence2": "%s", "score": %s}\n'
    assert sentence_pairs(write(line % ("The dog.", "5.0") + line % ("A cat.", "1"))) == expected


@pytest.mark.parametrize(
    ("read", "bad", "message"),
    [
        (questions, "Water is wet", "data.jsonl, line 2: not JSON"),
        (questions, "[1]", "line 2: a JSON list: write one object a line"),
        (questions, '{"choices": ["a", "b"], "answer": 0}', "field 'context' is missing.*found: choices, answer"),
        (questions, '{"context": " ", "choices": ["a", "b"], "answer": 0}', "field 'context' is ' '"),
        (questions, '{"question": 3, "choices": ["a", "b"], "answer": 0}', "field 'question' is 3"),
        (questions, '{"question": "x", "context": "x"}', "has both"),
        (questions, '{"context": "x", "choices": ["a", ""], "answer": 0}', "field 'choices' is"),
        (questions, '{"context": "x", "choices": ["a"], "answer": 0}', "at least two texts"),
        (questions, '{"context": "x", "choices": {"text": ["a", "b"]}, "answer": 0}', "field 'choices' is {'text'"),
        (questions, '{"context": "x", "choices": ["a", "b"], "answer": 2}', "'answer' is 2: .* from 0 to 1.* to B"),
        (questions, '{"context": "x", "choices": ["a", "b"], "answer": "C"}', "'answer' is 'C'"),
        (questions, '{"context": "x", "choices": ["a", "b"], "answer": true}', "'answer' is True"),
        (questions, '{"context": "x", "choices": ["a", "b"]}', "'answer' is None"),
        (last_word_texts, '{"text": "word"}', "line 2: the text 'word' is one word"),
        (last_word_texts, '{"txt": "two words"}', "field 'text' is missing"),
        (sentence_pairs, '{"sentence1": "a", "sentence2": "b", "score": "high"}', "field 'score' is 'high'"),
        (sentence_pairs, '{"sentence1": "a", "sentence2": "b", "score": NaN}', "field 'score' is nan"),
        (sentence_pairs, '{"sentence1": "a", "score": 1}', "field 'sentence2' is missing"),
    ],
)
def test_a_bad_line_is_named(write: Write, read: Callable[[Path], Any], bad: str, message: str) -> None:
    good = (
        '{"context": "x", "choices": ["a", "b"], "answer": 0, "text": "a b", "sentence1": "a", "sentence2": "b",'
        ' "score": 1}'
    )
    with pytest.raises(DataError, match=message):
        read(write(f"{good}\n{bad}\n"))


def test_bad_columns_and_files_are_named(write: Write, tmp_path: Path) -> None:
    columns = "a\tb\tc\td\t{}\t{}\tg\n"
    with pytest.raises(DataError, match=r"line 1: 3 columns .* \.jsonl"):
        sentence_pairs(write("a\tb\tc\n", "sts.csv"))
    with pytest.raises(DataError, match=r"line 2: the fifth column, the score, is 'e'"):
        sentence_pairs(write(columns.format("1", "f") + columns.format("e", "f"), "sts.csv"))
    with pytest.raises(DataError, match="a sentence, is empty"):
        sentence_pairs(write(columns.format("1", ""), "sts.csv"))
    with pytest.raises(DataError, match="same score"):
        sentence_pairs(write(columns.format("1", "f") * 2, "sts.csv"))
    with pytest.raises(DataError, match="is empty"):
        questions(write("\n \n"))
    with pytest.raises(DataError, match=r"cannot read .*: No such file"):
        questions(tmp_path / "nowhere.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9")
    with pytest.raises(DataError, match="not UTF-8"):
        questions(tmp_path / "latin.jsonl")
