"""A reward of three values: is the hero of a story a girl (0), a boy (1) or an animal (2)? The first of these words decides; without any
the reward is 0. This is all that a --reward FILE.py:FUNCTION needs.

    python -m minialign rloo --policy runs/stories260K --prompts once.jsonl --reward toy/heroes.py:hero
"""

import re

ANIMALS = """animal ant bear bee bird bug bunny butterfly cat cow dog duck elephant fish fox frog horse kitten lion monkey mouse owl pig
             puppy rabbit sheep squirrel tiger turtle"""
HERO = re.compile(rf"\b(girl|boy|{'|'.join(ANIMALS.split())})\b")
CLASSES = ("girl or nobody", "boy", "animal")  # what the rewards 0, 1 and 2 stand for


def hero(prompts, completions):
    """The rewards of the completions, one float each."""
    heroes = [HERO.search(text) for text in completions]
    return [0.0 if not found or found[1] == "girl" else 1.0 if found[1] == "boy" else 2.0 for found in heroes]
