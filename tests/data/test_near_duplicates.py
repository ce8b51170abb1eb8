"""Near-duplicates: the book's measure as scikit-learn computes it, and what the book's script gets wrong."""

from __future__ import annotations

import json
import math
import random
import re
from itertools import combinations, islice
from pathlib import Path

import pytest

from llm_lightning.data import near_duplicates
from llm_lightning.data.near_duplicates import Pair, find_near_duplicates, keep_first


def by_scikit_learn(texts: list[str], threshold: float) -> dict[tuple[int, int], float]:
    """The book's measure, over all pairs, with the indices of `texts`."""
    pytest.importorskip("sklearn", reason="needs the dev extra: scikit-learn")
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.metrics.pairwise import cosine_similarity

    kept = [index for index, text in enumerate(texts) if text]
    plain = [re.sub(r"[^\w\s]", "", texts[index].lower()) for index in kept]
    similarity = cosine_similarity(TfidfVectorizer(analyzer="char", ngram_range=(1, 3)).fit_transform(plain))
    return {
        (kept[i], kept[j]): similarity[i, j]
        for i, j in combinations(range(len(kept)), 2)
        if similarity[i, j] >= threshold and min(len(plain[i].strip()), len(plain[j].strip())) > 1
    }


def random_texts(n: int, seed: int = 0) -> list[str]:
    """Few letters, so that many texts are alike; cases, punctuation, spaces, other scripts, copies and empty ones."""
    draw = random.Random(seed)
    texts: list[str] = []
    for _ in range(n):
        text = "".join(draw.choices("aAb \u00e9.,!\u00df\u4e2d\U0001f600_7\n", k=draw.randrange(25)))
        if texts and draw.random() < 0.5:
            text = draw.choice(texts) + draw.choice(["", "", "!", " a", "  \t", text])
        texts.append(draw.choice([text, text, text.upper(), "" if draw.random() < 0.3 else text]))
    return texts


@pytest.mark.parametrize("threshold", [0.3, 0.75, 0.9, 0.999])
def test_pairs_and_similarities_are_those_of_scikit_learn(threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "BLOCK_ROWS", 7)
    monkeypatch.setattr(near_duplicates, "AT_ONCE", 100)
    texts = random_texts(300)
    expected = by_scikit_learn(texts, threshold)
    found = find_near_duplicates(texts, threshold)
    pairs = {(first, second): similarity for first, second, similarity in found.pairs()}
    assert pairs.keys() == expected.keys()
    assert all(first < second for first, second in pairs)
    assert max(abs(pairs[pair] - expected[pair]) for pair in pairs) < 1e-12
    assert found.n_pairs == len(pairs) == sum(1 for _ in found.pairs()) > 50


def test_similarity_by_hand() -> None:
    # "ab" and "ac" have a, b, ab and a, c, ac; of two documents both have a: its weight is ln(3/3) + 1 = 1, that of
    # the others ln(3/2) + 1.
    other = math.log(3 / 2) + 1
    (pair,) = find_near_duplicates(["ab", "", "ac"], 0.1).pairs()
    assert pair == Pair(0, 2, pytest.approx(1 / (1 + 2 * other**2), rel=1e-12))


def test_an_empty_text_moves_no_index() -> None:
    # The book's script would report records 0 and 1 here, and remove record 1.
    texts = ["", "Name a dwarf planet.", "List three colours.", "name a dwarf planet"]
    found = find_near_duplicates(texts)
    assert list(found.pairs()) == [Pair(1, 3, 1.0)]
    assert found.groups == [[1, 3]]
    assert keep_first(len(texts), found.groups) == [0, 1, 2]


@pytest.mark.parametrize("texts", [[], [""], ["", ""], ["alone"], ["!", "?", "..."], [" ", "\n\n"]])
def test_nothing_to_compare(texts: list[str]) -> None:
    found = find_near_duplicates(texts)
    assert (found.n_pairs, found.groups, list(found.pairs())) == (0, [], [])


def test_one_character_is_no_duplicate() -> None:
    assert find_near_duplicates(["7", "7", "7.", " 7", "B", "b", "77", "77!"]).groups == [[6, 7]]


def test_threshold_one_finds_equal_texts_only() -> None:
    texts = ["The verb is 'sleeps'.", "the verb  is sleeps", "the verb is sleep", "The verb is sleeps\n\n"]
    assert find_near_duplicates(texts, 1.0).groups == [[0, 1]]
    similar = {(i, j): s for i, j, s in find_near_duplicates(texts, 0.5).pairs()}
    assert similar[0, 1] == 1.0
    assert all(0.5 <= value <= 1.0 for value in similar.values())


def test_different_texts_with_the_same_triples_have_similarity_one() -> None:
    # Rounding makes such products 0.9999999999999998 or 1.0000000000000002.
    draw = random.Random(0)
    parts = [["".join(draw.choices("cdefgh", k=draw.randrange(1, 9))) for _ in range(2)] for _ in range(50)]
    texts = [text for x, y in parts for text in (f"ab{x}ab{y}ab", f"ab{y}ab{x}ab")]
    similar = {(i, j): similarity for i, j, similarity in find_near_duplicates(texts, 1.0).pairs()}
    assert {(i, i + 1) for i in range(0, 100, 2)} <= similar.keys()
    assert all(1 - 1e-12 < similarity <= 1 for similarity in similar.values())


def test_groups_are_connected_and_in_order() -> None:
    texts = ["zzz zzz", "abcdefgh", "bcdefghi", "cdefghij", "zzz zzz", "other words"]
    pairs = {(i, j) for i, j, _ in find_near_duplicates(texts, 0.6).pairs()}
    assert (1, 2) in pairs
    assert (2, 3) in pairs
    assert (1, 3) not in pairs
    assert find_near_duplicates(texts, 0.6).groups == [[0, 4], [1, 2, 3]]


@pytest.mark.parametrize("seed", range(5))
def test_groups_hold_what_pairs_connect(seed: int) -> None:
    texts = random_texts(60, seed)
    found = find_near_duplicates(texts, 0.8)
    group_of = list(range(len(texts)))
    for first, second, _ in found.pairs():
        group_of = [group_of[first] if group == group_of[second] else group for group in group_of]
    members = [[i for i, group in enumerate(group_of) if group == wanted] for wanted in dict.fromkeys(group_of)]
    assert found.groups == [group for group in members if len(group) > 1]


def test_a_text_that_stands_20_000_times() -> None:
    found = find_near_duplicates(["N/A", *["n/a"] * 19_999, "something else"])
    assert found.n_pairs == 20_000 * 19_999 // 2
    assert found.groups == [list(range(20_000))]
    assert list(islice(found.pairs(), 2)) == [Pair(0, 1, 1.0), Pair(0, 2, 1.0)]


def test_keeping_the_first_of_groups_of_several_keys() -> None:
    assert keep_first(3, []) == [0, 1, 2]
    assert keep_first(6, [[0, 2, 4], [1, 5]]) == [0, 1, 3]
    # 1 is gone when the second key comes to [1, 3], so 3 is the first that is there.
    assert keep_first(4, [[0, 1], [1, 3]]) == [0, 2, 3]


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.1, math.nan])
def test_a_threshold_outside_its_range_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match=f"threshold={threshold} must be above 0 and at most 1"):
        find_near_duplicates(["a", "b"], threshold)


def test_too_many_pairs_are_an_error_and_not_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"row {number} of a table" for number in range(30)]
    assert find_near_duplicates(texts, 0.01).n_pairs == 435
    monkeypatch.setattr(near_duplicates, "MAX_PAIRS", 434)
    with pytest.raises(ValueError, match=r"threshold=0.01 finds more than 434 pairs of texts; raise it"):
        find_near_duplicates(texts, 0.01)


@pytest.mark.parametrize("key", ["instruction", "input", "output"])
def test_the_real_file_as_scikit_learn(key: str, data_dir: Path) -> None:
    records = json.loads((data_dir / "instruction-data.json").read_text(encoding="utf-8"))
    texts = [record[key] for record in records]
    expected = by_scikit_learn(texts, 0.9)
    pairs = {(first, second): similarity for first, second, similarity in find_near_duplicates(texts).pairs()}
    assert pairs.keys() == expected.keys()
    assert max(abs(pairs[pair] - expected[pair]) for pair in pairs) < 1e-12
    for first, second in pairs:
        assert texts[first]
        assert texts[second]
