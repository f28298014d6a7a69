"""The built-in task against its own distributions: what is sampled, labelled and rewarded."""

import math
import random
from collections import Counter

import pytest

from minialign.data import as_feedback
from minialign.task import (
    EXPERT,
    POLITE_OPENINGS,
    RUDE,
    THINGS,
    builtin_demos,
    builtin_feedback,
    builtin_law,
    builtin_pairs,
    builtin_prompt,
    builtin_texts,
    builtin_tokenizer,
    gold_reward,
)
from minialign.tokenizer import CharTokenizer


def z_scores(frequencies, law, n):
    return [(frequencies.get(key, 0) - n * p) / math.sqrt(n * p * (1 - p)) for key, p in law.items()]


@pytest.mark.parametrize("politeness", [0.9, 0.25, 0.0, 1.0])
def test_laws_are_distributions_over_36_answers(politeness):
    for thing in THINGS:
        law = builtin_law(builtin_prompt(thing), politeness)
        assert len(law) == 36 and abs(sum(law.values()) - 1) < 1e-12 and all(thing in completion for completion in law)
    assert law[f"may i have {thing}, please."] == pytest.approx(politeness**2 / 9)
    assert law[f"give me {thing}, please."] == pytest.approx(politeness * (1 - politeness) / 9)


def test_sampled_frequencies_follow_the_laws():
    """Texts: rude speakers. Demonstrations: .7 expert + .3 rude (no speaker of average politeness). 20,000 each, 5 s.d."""
    n = 20_000
    rude, expert = ({prompt: builtin_law(prompt, p) for prompt in map(builtin_prompt, THINGS)} for p in (RUDE, EXPERT))
    texts = {prompt + c: p / 24 for prompt, law in rude.items() for c, p in law.items()}
    assert max(map(abs, z_scores(Counter(builtin_texts(n)), texts, n))) < 5
    demos = {(prompt, c): (0.7 * p + 0.3 * rude[prompt][c]) / 24 for prompt, law in expert.items() for c, p in law.items()}
    seen = Counter((demo.prompt, demo.completion) for demo in builtin_demos(n))
    assert set(seen) <= set(demos) and max(map(abs, z_scores(seen, demos, n))) < 5
    openings = [demo.completion.startswith(POLITE_OPENINGS) for demo in builtin_demos(n, low_quality=0.0)]
    assert abs(sum(openings) / n - EXPERT) < 0.01


def test_gold_reward_by_hand():
    """+1 for the thing, ±1 for opening and ending."""
    cases = [("may i have tea, please.", 3), ("give me tea, please.", 1), ("may i have tea now!", 1), ("give me tea or else!", -1),
             ("give me salt now!", -2), ("may i have salt, thank you.", 2), ("tea", 0), ("", 0), ("bring tea", 1), ("i want", -1),
             ("i would like a coat if you can.", 2)]
    prompts = [builtin_prompt("tea")] * len(cases)
    assert gold_reward(prompts, [text for text, _ in cases]) == [reward for _, reward in cases]
    assert gold_reward([builtin_prompt("a map")], ["could i get a map, thank you."]) == [3]
    with pytest.raises(ValueError):
        gold_reward(["one"], [])


def test_pairs_obey_bradley_terry():
    """Of n pairs that differ by d in gold reward, the better was chosen with frequency σ(d), equal ones are no information: 4 s.d."""
    wins = {}
    for pair in builtin_pairs(8000):
        chosen, rejected = gold_reward([pair.prompt] * 2, [pair.chosen, pair.rejected])
        wins.setdefault(abs(chosen - rejected), []).append(chosen > rejected)
    assert set(wins) == {0, 2, 4}
    for gap in (2, 4):
        n, p = len(wins[gap]), 1 / (1 + math.exp(-gap))
        assert n > 300 and abs(sum(wins[gap]) - n * p) < 4 * math.sqrt(n * p * (1 - p))


def test_pairs_are_answers_of_rude_speakers_to_one_prompt():
    """Chosen and rejected together follow the rude law: choosing only orders them."""
    pairs, n = builtin_pairs(8000), 16_000
    law = {(prompt, c): p / 24 for prompt in map(builtin_prompt, THINGS) for c, p in builtin_law(prompt, RUDE).items()}
    seen = Counter((pair.prompt, text) for pair in pairs for text in (pair.chosen, pair.rejected))
    assert set(seen) <= set(law) and sum(seen.values()) == n
    polite = sum(count for (_, text), count in seen.items() if text.startswith(POLITE_OPENINGS))
    assert abs(polite / n - RUDE) < 4 * math.sqrt(0.25 * 0.75 / n)


def test_the_task_repeats_and_its_seeds_differ():
    assert builtin_feedback(50, seed=3) == [row for pair in builtin_pairs(50, seed=3) for row in as_feedback(pair)]
    for make in (builtin_texts, builtin_demos, builtin_pairs):
        assert make(50, seed=3) == make(50, seed=3) != make(50, seed=4)
        assert make(20, seed=3) == make(50, seed=3)[:20]
    state = random.getstate()
    builtin_pairs(5)
    assert random.getstate() == state


def test_the_builtin_tokenizer_covers_the_task():
    tokenizer = builtin_tokenizer()
    assert isinstance(tokenizer, CharTokenizer)
    for text in builtin_texts(200) + [demo.prompt + demo.completion for demo in builtin_demos(200)]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
