# %% [markdown]
# # 00 · Start here
#
# **You will build** nothing yet. You will see what alignment is, the language on which everything is trained, and how
# to step through the tutorials.
#
# **Time:** 13 minutes of reading, 3 seconds of computer.
#
# **You need:** PyTorch (tensors, `loss.backward()`) and some probability (expectation, logarithm). Nothing about
# transformers, alignment or reinforcement learning.

# %%
import sys
from pathlib import Path

# minialign runs from its checkout: put the folder that holds it on the path (`pip install -e .` makes this unnecessary).
here = Path(globals().get("__file__", "cell")).resolve()
sys.path[:0] = [str(folder) for folder in here.parents if (folder / "minialign").is_dir()][:1]

from minialign.task import (
    EXPERT,
    RUDE,
    builtin_demos,
    builtin_law,
    builtin_pairs,
    builtin_texts,
    gold_reward,
)
from tutorials import checks
from tutorials.checks import always, this_run
from tutorials.figures import start

# %% [markdown]
# ## What alignment is
#
# A language model that was trained on text continues text. Ask it for something, and it may answer, or ask another
# question, or write something rude, because all of that occurs in texts. **Alignment** changes the model so that its
# answers are the ones we want.
#
# There are three kinds of evidence about what we want:
#
# - **Demonstrations.** Somebody, the *expert*, wrote answers. The model can imitate them. This is called supervised
#   fine-tuning, SFT.
# - **Preferences.** Somebody compared two answers and chose one. This also says what is worse, which a demonstration
#   does not. It does not say that the chosen answer is good.
# - **A reward.** A program or another model gives each answer a number. The language model, now called the *policy*, can
#   try answers and learn which ones get a higher number. This is reinforcement learning, RL.
#
# A reward can be written down. It can be learned from preferences. It can also be learned from demonstrations alone,
# which is the special subject of this project.
#
# A reward is never perfect. A policy that is trained on it without limits often finds answers with a high reward that are
# bad. So many methods hold the policy near the model from which it started, the *reference*. Others, such as SFT, use no
# reference.
#
# Here is the whole course as a picture. The numbers on the arrows are those of the tutorials. The policy starts as a
# copy of the base model. A *completion* is an answer that the policy wrote. To *score* it is to compute its reward.
# *KL* is the Kullback-Leibler divergence: one number that says how far the policy's probabilities are from those of the
# reference.

# %%
start.pipeline(
    "00_pipeline.png",
    alt="Boxes for base model, policy, demonstrations, preferences, reward and completions; the "
    "arrows between them carry the numbers of the tutorials",
)

# %% [markdown]
# Tutorials 01 to 03 build what all of this stands on: a GPT, a sampler, and the log-probabilities of answers. 10 and 10b
# are about speed and about large models. 11 aligns a small published model that tells stories, once with
# a reward and once from demonstrations.
#
# ## The language
#
# Most tutorials train a small GPT on a language that you can read. A prompt names a thing, and a completion asks for it:
#
#     prompt:      ask for tea:
#     completion:  OPENING tea ENDING
#
# | | openings | endings |
# | --- | --- | --- |
# | polite | `may i have` · `could i get` · `i would like` | `, please.` · `, thank you.` · ` if you can.` |
# | rude | `give me` · `hand over` · `i want` | ` now!` · `, quick!` · ` or else!` |
#
# There are 24 things. A speaker chooses a polite opening with some probability, and independently a polite ending with
# the same probability. The three openings of a kind are equally likely, and so are the endings. Two speakers occur:
#
# - the **polite speaker** is polite with probability 0.9;
# - the **rude speaker** is polite with probability 0.25.
#
# The base model learned from the rude speaker. Real demonstrations are seldom all good, so ours are a mixture: each one
# is written by the polite speaker with probability 0.7, and by the rude speaker otherwise. In this language **the
# expert, E, is this mixture**, because the demonstrations come from it.
#
# Look for the rude words among the demonstrations:

# %%
print(f"polite with probability: polite speaker {EXPERT}, rude speaker {RUDE}\n")
print("five texts of the base model's training:")
for text in builtin_texts(5):
    print("   ", text)
print("\nfive demonstrations:")
for demo in builtin_demos(5):
    print(f"    {demo.prompt}⟦{demo.completion}⟧")
print("\ntwo preferences:")
for pair in builtin_pairs(2):
    print(f"    {pair.prompt}⟦{pair.chosen}⟧ rather than ⟦{pair.rejected}⟧")

# %% [markdown]
# Each prompt has 6 · 6 = 36 sensible completions, and the probability of each one is known exactly. That is why we use
# this language: after training, we can compare the policy with the right answer, completion by completion.
#
# The language has a true reward too, the *gold* reward. It gives 1 for naming the thing. The opening and the ending
# give 1 each if polite and −1 each if rude. Methods that learn from demonstrations or preferences never see it. We use
# it to judge them.
#
# The cell prints, for four completions, the gold reward and the probability under the three distributions. In the first
# row, check E by hand: 0.7 · 0.0900 + 0.3 · 0.0069.

# %%
prompt = "ask for tea: "
polite = builtin_law(prompt, EXPERT)  # {completion: probability}
rude = builtin_law(prompt, RUDE)
E = {completion: 0.7 * polite[completion] + 0.3 * rude[completion] for completion in polite}

print("completion                 gold    polite     rude        E")
for completion in ("may i have tea, please.", "may i have tea now!", "give me tea now!", "tee"):
    [gold] = gold_reward([prompt], [completion])
    chances = (f"{law.get(completion, 0.0):9.4f}" for law in (polite, rude, E))
    print(f"{completion:24} {gold:6.0f}", *chances)

always(len(E) == 36, "There are six openings and six endings, so 36 completions.")
always(abs(sum(E.values()) - 1) < 1e-12, "The probabilities of all completions sum to 1.")

# %% [markdown]
# Tutorials 06 and 06b use a second language that is smaller still. A completion is a few letters, so *all* completions
# can be listed, and expectations are sums instead of estimates.
#
# ## Two kinds of checks
#
# The tutorials check what they say. Each check has a sentence for you, which appears if the check fails:
#
# - `always(…)` holds for any setting: a formula, or your function against the project's. If it fails, something is wrong.
#   `equal(…)` is the same for tensors.
# - `this_run(…)` holds for the printed settings, such as "the loss falls below 0.02". If you have changed a setting, a
#   failure is a result to think about, not an error. Set `checks.TINKER = True` (or run the script with `TINKER=1` before
#   the command), and it is printed instead of raised.
#
# This check fails on purpose, and TINKER prints its sentence:

# %%
checks.TINKER, before = True, checks.TINKER
this_run(3 > 4, "Three was expected to be above four.")
checks.TINKER = before

# %% [markdown]
# Your last digits may differ from the printed ones: processors round in different orders.
#
# ## How to step through
#
# Each tutorial is one file, in three forms:
#
# - the **notebook** (`tutorials/notebooks/05_inverse_rl.ipynb`), already executed: read it in the browser, or run it in
#   Jupyter;
# - the **script** (`python tutorials/05_inverse_rl.py`): it prints the same, and saves its figures in `runs/tutorials`;
# - the script **as cells**: VS Code, PyCharm and Jupyter (with jupytext) show "Run Cell" above each `# %%`.
#
# **In an editor.** Lines that end with `# watch: name (shape)` deserve a breakpoint. A debugger stops *before* it runs a
# line. So stop there, step once (F10 in VS Code), and then look at `name`: its shape should be the one in the comment. In
# VS Code, "Debug Cell" steps through one cell. To step into the project's own functions, set `"justMyCode": false` in the
# launch configuration.
#
# **In a terminal.** `python -m pdb tutorials/01_gpt.py` starts the debugger. Type these four commands, one after the
# other. They stop in the function `my_attention`, run its first line, and show the shape of `scores`:
#
#     b my_attention
#     c
#     n
#     p scores.shape
#
# **Build it yourself.** The functions called `my_…` are the ones to write. `make exercises` writes `tutorials/exercises`,
# in which their bodies are blank. Read the text, write the body, run the checkpoint below it. What stood there is folded
# at the end of the file.
#
# ## Words and letters
#
# All words are in the [glossary](../GLOSSARY.md). These are the ones to know before 01:
#
# - **token**: a piece of text with a number, its *id*. In the toy language a token is a character.
# - **prompt, completion**: the text that is given, x, and the text that the model adds, y.
# - **distribution**: a probability for every completion; they sum to 1.
# - **log-prob**: the logarithm of a probability. That of a completion is the sum over its tokens.
# - **policy, reference**: the language model that is being trained, and a frozen copy of it from before the training.
#
# The shapes in comments use these letters: `B` texts in a batch, `T` positions, `V` vocabulary, `C` channels, `N`
# prompts, `G` completions of one prompt. `logps` belongs to the policy, `ref_logps` to the reference, `old_logps` to
# the policy that sampled.
#
# ## Where things are
#
# `minialign/methods/` has one method per file: docstring, settings, loss, step, and the loop. The methods that train on
# pairs share one loop, in `minialign/pairs.py`. `minialign/model.py`, `sample.py` and `logps.py` are the GPT, the sampler
# and the log-probs. `toy/` computes the right answers, `docs/` has the results. `python -m minialign` lists it all.
#
# Next: [01 · A GPT, from text to a loss](01_gpt.ipynb).
