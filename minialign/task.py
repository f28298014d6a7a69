"""The built-in task: a small language of requests, whose exact distributions are known. Every method runs on it without a download.

A prompt names a thing; a completion asks for it with an opening, the thing, and an ending. Openings and endings are polite or rude.
Speakers differ only in how often they are polite, so the distribution of each speaker is known exactly. The base model learned from
rude speakers. Most demonstrations come from a polite expert, the rest from rude speakers.

Checked by tests/test_task.py.
"""

import math
import random

from minialign.data import Demo, Pair, as_feedback
from minialign.engine.common import derive_seed
from minialign.tokenizer import CharTokenizer

THINGS = ("tea", "bread", "soap", "a map", "a pen", "salt", "honey", "a lamp", "paper", "a key", "milk", "a chair",
          "rope", "a book", "ink", "a coat", "rice", "a cup", "wood", "a bell", "corn", "a hat", "oil", "a spoon")
POLITE_OPENINGS, RUDE_OPENINGS = ("may i have", "could i get", "i would like"), ("give me", "hand over", "i want")
POLITE_ENDINGS, RUDE_ENDINGS = (", please.", ", thank you.", " if you can."), (" now!", ", quick!", " or else!")
EXPERT, RUDE = 0.9, 0.25  # probability that the opening is polite; the same, independently, for the ending


def builtin_prompt(thing):
    return f"ask for {thing}: "


def builtin_law(prompt, politeness):
    """{completion: probability} of a speaker: the exact distribution of what the speaker answers."""
    thing = prompt.removeprefix("ask for ").removesuffix(": ")
    law = {}
    for openings, p_opening in ((POLITE_OPENINGS, politeness), (RUDE_OPENINGS, 1 - politeness)):
        for endings, p_ending in ((POLITE_ENDINGS, politeness), (RUDE_ENDINGS, 1 - politeness)):
            for opening in openings:
                for ending in endings:
                    law[f"{opening} {thing}{ending}"] = p_opening * p_ending / (len(openings) * len(endings))
    return law


def gold_reward(prompts, completions):
    """The programmatic reward of the built-in task for lists of text, in [−2, 3]: +1 if the text names the thing. The opening and the
    ending each add +1 if polite, −1 if rude, 0 if neither. Methods that learn from demonstrations never see it."""
    rewards = []
    for prompt, text in zip(prompts, completions, strict=True):
        thing = prompt.removeprefix("ask for ").removesuffix(": ")
        rewards.append(
            float(f" {thing}" in text)
            + text.startswith(POLITE_OPENINGS) - text.startswith(RUDE_OPENINGS)
            + text.endswith(POLITE_ENDINGS) - text.endswith(RUDE_ENDINGS)
        )
    return rewards


def _speak(rng, politeness):
    prompt = builtin_prompt(rng.choice(THINGS))
    law = builtin_law(prompt, politeness)
    return prompt, rng.choices(list(law), weights=list(law.values()))[0]


def builtin_texts(n=2000, seed=0):
    """The texts that the base model is trained on: requests of rude speakers."""
    rng = random.Random(derive_seed("texts", seed))
    return ["".join(_speak(rng, RUDE)) for _ in range(n)]


def builtin_demos(n=200, seed=0, low_quality=0.3):
    """Each demonstration comes from the polite speaker, or with probability `low_quality` from a rude one."""
    rng = random.Random(derive_seed("demos", seed))
    return [Demo(*_speak(rng, RUDE if rng.random() < low_quality else EXPERT)) for _ in range(n)]


def builtin_prompts():
    """One prompt for each thing."""
    return [builtin_prompt(thing) for thing in THINGS]


def builtin_pairs(n=400, seed=0):
    """Two answers of rude speakers to each prompt. The first is chosen with Bradley-Terry probability σ(difference of gold rewards)."""
    rng, pairs = random.Random(derive_seed("pairs", seed)), []
    for _ in range(n):
        prompt, first = _speak(rng, RUDE)
        law = builtin_law(prompt, RUDE)
        second = rng.choices(list(law), weights=list(law.values()))[0]
        rewards = gold_reward([prompt, prompt], [first, second])
        keep = rng.random() < 1 / (1 + math.exp(rewards[1] - rewards[0]))
        pairs.append(Pair(prompt, *((first, second) if keep else (second, first))))
    return pairs


def builtin_feedback(n=400, seed=0):
    """The answers of builtin_pairs, one at a time."""
    return [row for pair in builtin_pairs(n, seed) for row in as_feedback(pair)]


def builtin_tokenizer():
    alphabet = "".join(builtin_prompt(thing) + "".join(builtin_law(builtin_prompt(thing), EXPERT)) for thing in THINGS)
    return CharTokenizer(alphabet)
