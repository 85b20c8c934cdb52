import json
import random
import sys

import pytest
from datasets import Dataset

from training.data import near_duplicates
from training.data.corpora import CorpusArguments, read_corpora
from training.errors import UserError


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def read(sources, **options):
    return read_corpora(CorpusArguments(sources, **options))


def numbered(numbers):
    return " ".join(f"w{number}" for number in numbers)


def test_near_duplicates_by_hand(tmp_path):
    """100 words have 96 runs of five. One word changed in the middle changes 5 of them: 91 / 101 = 0.901 are common."""
    first = numbered(range(100))
    near = numbered([*range(50), 1000, *range(51, 100)])
    far = numbered(range(50, 150))  # 46 / 146 = 0.315
    path = write(tmp_path / "a.jsonl", [first, far, near, "short", first])
    other = write(tmp_path / "b.jsonl", ["short  ", near + " end"])
    pytest.importorskip("datasketch", reason="pip install datasketch")
    assert near_duplicates._jaccard(near_duplicates._shingles(first), near_duplicates._shingles(near)) == 91 / 101
    assert near_duplicates._jaccard(near_duplicates._shingles(first), near_duplicates._shingles(far)) == 46 / 146
    for _ in range(2):  # the second time from the cache
        one, two = read([path, other, write(tmp_path / "c.jsonl", ["else"])], near_duplicates=0.9)[:2]
        assert (one.documents["text"][:], one.duplicates, one.near_duplicates) == ([first, far, "short"], 1, 1)
        assert (two.documents["text"][:], two.duplicates, two.near_duplicates) == ([near + " end"], 0, 1)  # 91 / 102 < 0.9
    one = read([path], near_duplicates=0.91)[0]
    assert (one.near_duplicates, len(one.documents)) == (0, 4)
    one = read([path], near_duplicates=0.3)[0]
    assert (one.near_duplicates, len(one.documents)) == (2, 2)


def test_near_duplicates_are_those_of_comparing_all_pairs():
    pytest.importorskip("datasketch", reason="pip install datasketch")
    draw = random.Random(0)
    originals = [[draw.randrange(500) for _ in range(60)] for _ in range(30)]
    noisy = [[word if draw.random() < 0.98 else 999 for word in draw.choice(originals)] for _ in range(70)]
    corpus = [numbered(words) for words in originals + noisy]
    kept: list[int] = []
    for index, text in enumerate(corpus):
        sets = [{tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (corpus[k].split() for k in kept)]
        words = text.split()
        mine = {tuple(words[i : i + 5]) for i in range(len(words) - 4)}
        if all(len(mine & other) / len(mine | other) < 0.7 for other in sets):
            kept.append(index)
    assert 30 < len(kept) < 100
    sources = [Dataset.from_dict({"text": part}) for part in (corpus[:40], corpus[40:])]
    found = [source["text"][:] for source in near_duplicates.drop_near_duplicates(sources, 0.7)]
    assert found == [[corpus[k] for k in kept if k < 40], [corpus[k] for k in kept if k >= 40]]


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(UserError, match="--near_duplicates needs another package: pip install datasketch"):
        read([write(tmp_path / "a.jsonl", ["a"])], near_duplicates=0.8)
