"""Counts by hand, and sentences that the word lists must and must not see."""
import pytest

from virtue.ethics import VIRTUES
from virtue.evaluation.textstats import (
    FLATTERY,
    HEDGES,
    REFUSALS,
    VIRTUE_WORDS,
    contains,
    degenerate,
    density,
    measures,
    repetition,
)


def test_density_by_hand():
    assert density("Honest men are, perhaps, HONEST.", ["honest"]) == 100 * 2 / 5
    assert density("I think so. I  think\nnot.", ["i think", "so"]) == 100 * 3 / 6
    assert density("", ["honest"]) == density(" ... !", ["honest"]) == 0
    # one place counts once, for the longest phrase that fits
    assert density("it may be", ["may", "be", "may be"]) == 100 / 3


@pytest.mark.parametrize("text, phrase, found", [
    ("dishonest", "honest", False), ("honestly", "honest", False),
    ("an 'honest' man", "honest", True), ("honest", "honest", True),
    ("self-respect", "respect", True), ("honest_man", "honest", False),
    ("I can't go", "i can", False), ("I can’t go", "i can't", True),
    ("I can't go", "I can’t", True), ("don't", "t", False),
    ("I’m sorry, but no", "i'm sorry but", True), ("sorry. But", "sorry but", False),
    ("what (great) x", "what great", False), ("5.0", "5x0", False), ("ÉCOLE", "école", True),
    ("a.c", "a.c", True), ("abc", "a.c", False)])
def test_phrases_are_whole_words_in_any_case(text, phrase, found):
    assert contains(text, [phrase]) is found and contains(text, ["nowhere", phrase]) is found
    assert (density(text, [phrase]) > 0) is found


@pytest.mark.parametrize("phrases, yes, no", [
    (REFUSALS,
     ["I'm sorry, but I can't help with that.", "As an AI language model, I have no address.",
      "I cannot provide her address.",
      "I’m not able to share this.", "I will not help you insult him.", "I must decline."],
     ["I can't imagine how hard this is for you.", "I'm sorry to hear that.",
      "I cannot wait to see the cake.", "I can help you.", "I tell Anna the truth."]),
    (HEDGES, ["Perhaps she is right.", "It depends on her.", "I’m not sure."],
     ["She is right.", "The mighty are unlikely to."]),
    (FLATTERY, ["What a great idea!", "Great question!", "You’re absolutely right."],
     ["That is a question.", "She is right."]),
    (VIRTUE_WORDS, [*VIRTUES, "Be humble.", "WISDOM"],
     ["He is dishonest.", "That kind of cake, respectively.", "disrespect"])])
def test_lists_see_what_they_are_for(phrases, yes, no):
    assert [t for t in yes if not contains(t, phrases)] == []
    assert [t for t in no if contains(t, phrases)] == []


@pytest.mark.parametrize("phrases", [REFUSALS, HEDGES, FLATTERY, VIRTUE_WORDS])
def test_lists_are_lower_case_without_commas_doubles_or_curls(phrases):
    assert len(set(phrases)) == len(phrases) and all(contains(p, [p]) for p in phrases)
    assert all(p == p.lower() and "," not in p and "’" not in p for p in phrases)


def test_repetition_by_hand():
    assert repetition("a b c a b c") == 1 / 4  # abc bca cab, abc again
    assert repetition("A, b. C a b c", n=1) == 3 / 6
    assert repetition("x " * 10) == 7 / 8 and repetition("a b c d") == 0
    assert repetition("") == repetition("a a") == repetition("a a a") == 0
    assert repetition("a a a a") == 1 / 2
    assert repetition("I can’t, I can't", n=2) == 1 / 3
    with pytest.raises(ValueError, match="n >= 1"):
        repetition("a", n=0)


def test_measures_by_hand():
    got = measures(["I must decline", "Perhaps an honest man, perhaps humble",
                    "Great question", "x x x x"])
    assert got == {"refusals": 1 / 4, "hedges": 100 * 2 / 6 / 4, "flattery": 50 / 4,
                   "virtue_words": 100 * 2 / 6 / 4, "repetition": 1 / 8}


def test_degenerate_answers_are_what_they_say():
    got = degenerate("Why?", "I tell Anna the truth.")
    assert list(got) == ["empty", "repeated", "echo", "refusal", "virtue words"]
    assert (got["empty"], got["echo"]) == ("", "Why?")
    assert got["repeated"] == " ".join(["I tell Anna the truth."] * 3)
    assert contains(got["refusal"], REFUSALS) and density(got["virtue words"], VIRTUE_WORDS) == 100
    assert repetition(got["repeated"]) > 0.3


@pytest.mark.parametrize("phrases", [[], "honest", [""], ["honest", " "]])
def test_bad_phrases(phrases):
    for f in (contains, density):
        with pytest.raises(ValueError, match="phrases"):
            f("honest", phrases)


@pytest.mark.parametrize("texts", [[], "honest", ()])
def test_bad_texts(texts):
    with pytest.raises(ValueError, match="list of texts"):
        measures(texts)
