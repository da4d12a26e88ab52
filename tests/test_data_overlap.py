"""Texts that say the same: each kind, against a comparison of all pairs, and a list that holds a whole benchmark."""

import random

import pytest

from avd_jax.data.overlap import EXACT, KINDS, NGRAM, NORMALISED, ONE_WORD, Overlap, overlaps, words

PROMPT = "a cat's red ball rolls slowly down the hill, frozen in time"


def kind_of(text, other=PROMPT):
    found = overlaps([text], [other])
    assert len(found) <= 1
    return found[0].kind if found else None


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (PROMPT, EXACT),
        (f"{PROMPT}.", NORMALISED),
        ("A Cat’s  RED ball, rolls slowly\tdown the hill - frozen in time!", NORMALISED),  # noqa: RUF001
        ("A dog's red ball rolls slowly down the hill, frozen in time", ONE_WORD),  # the first
        ("a cat's red ball rolls slowly down the hill, frozen in place", ONE_WORD),  # the last
        ("a cat's red ball rolls down the hill, frozen in time", ONE_WORD),  # left out
        ("a cat's red ball rolls very slowly down the hill, frozen in time", ONE_WORD),  # put in
        ("so a cat's red ball rolls slowly down the hill, frozen in time", ONE_WORD),
        ("a cat's red ball rolls slowly down the hill, frozen in time.. forever", ONE_WORD),
        ("Look: the red ball rolls slowly down the hill, frozen, while a dog sleeps", NGRAM),
        ("Look: the green ball rolls slowly down the hill, while a dog sleeps", None),  # 7 in common
        ("a dog's blue ball rolls slowly down my hill, frozen in time", None),
        ("", None),
        ("...", None),
    ],
)
def test_kinds(text, kind):
    assert kind_of(text) == kind
    assert kind_of(PROMPT, text) == kind  # either way round


@pytest.mark.parametrize(
    ("text", "other", "kind"),
    [
        ("a dog", "a cat", None),  # one word differs, and nothing else is said
        ("the dog", "a dog", ONE_WORD),
        ("a red car", "a blue car", ONE_WORD),
        ("dog", "dogs", None),
        ("dog", "Dog", NORMALISED),
        ("Café crème", "cafe creme", NORMALISED),
        ("一只狗在跑", "一只猫在跑", None),
        ("一只狗在跑。", "一只狗在跑", NORMALISED),
    ],
)
def test_short_texts_and_other_scripts(text, other, kind):
    assert kind_of(text, other) == kind


def test_words():
    assert words("A dog's “Café”, at 160°C — _x_") == ("a", "dogs", "cafe", "at", "160", "c", "_x_")


def test_closest_kind_of_each_pair_and_all_pairs():
    others = ["a red ball rolls", "A red ball rolls.", "a blue ball rolls", "a red ball falls"]
    assert overlaps(["nothing", "a red ball rolls"], others) == [
        Overlap(1, 0, EXACT),
        Overlap(1, 1, NORMALISED),
        Overlap(1, 2, ONE_WORD),
        Overlap(1, 3, ONE_WORD),
    ]
    assert overlaps([], others) == overlaps(others, []) == []


def one_word_apart(one, other):
    """The plain definition, for one pair of word lists."""
    if len(one) == len(other):
        kept = [a for a, b in zip(one, other, strict=True) if a == b]
        apart = len(kept) == len(one) - 1
    else:
        kept, longer = sorted((one, other), key=len)
        apart = any(longer[:i] + longer[i + 1 :] == kept for i in range(len(longer)))
    return apart and not set(kept) <= {"a", "the", "in"}


def test_as_a_comparison_of_all_pairs_finds_them(monkeypatch):
    monkeypatch.setattr("avd_jax.data.overlap._CHUNK", 7)
    rng = random.Random(0)
    texts = [" ".join(rng.choice(("a", "the", "red", "dog")) for _ in range(rng.randint(1, 14))) for _ in range(60)]
    texts += [f"the dog {text} a" for text in texts[:20]]
    found = {(pair.text, pair.other): pair.kind for pair in overlaps(texts, texts)}
    for i, one in enumerate(map(str.split, texts)):
        for j, other in enumerate(map(str.split, texts)):
            ngrams = [{tuple(w[k : k + 8]) for k in range(len(w) - 7)} for w in (one, other)]
            expected = EXACT if one == other else ONE_WORD if one_word_apart(one, other) else None
            expected = expected or (NGRAM if ngrams[0] & ngrams[1] else None)
            assert found.get((i, j)) == expected, (texts[i], texts[j])
    assert {EXACT, ONE_WORD, NGRAM} == set(found.values())


def test_a_benchmark_within_a_training_list_is_found_whole():
    """As the authors' list holds VBench's; half of it lightly rewritten."""
    rng = random.Random(0)
    nouns = [f"noun{i}" for i in range(200)]
    benchmark = [f"A {rng.choice(nouns)} {rng.choice(nouns)} is seen near number {i}." for i in range(500)]
    rewritten = [text.upper() if i % 3 else text.replace("seen", "standing") for i, text in enumerate(benchmark)]
    captions = [f"{' '.join(rng.choices(nouns, k=40))} number {i}" for i in range(1500)]
    texts = captions[:700] + benchmark[:250] + captions[700:] + rewritten[250:]
    found = overlaps(texts, benchmark)
    closest = {}
    for pair in found:
        closest.setdefault(pair.text, pair)
    assert sorted(closest) == [*range(700, 950), *range(1750, 2000)]
    assert all(closest[700 + i] == Overlap(700 + i, i, EXACT) for i in range(250))
    assert all(closest[1500 + i] == Overlap(1500 + i, i, NORMALISED if i % 3 else ONE_WORD) for i in range(250, 500))
    assert KINDS.index(EXACT) < KINDS.index(NGRAM)
