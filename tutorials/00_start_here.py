# %% [markdown]
# # 00 · Start here
#
# **You will build** nothing yet. You will see what alignment is, the language on which everything is trained, and how to step through
# the tutorials.
#
# **Time:** 10 minutes of reading, 3 seconds of computer.
#
# **You need:** PyTorch (tensors, `loss.backward()`) and some probability (expectation, logarithm). Nothing about transformers,
# alignment or reinforcement learning.

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
# A language model that was trained on text continues text. Ask it for something, and it may answer, or ask another question, or be
# rude, because all of that occurs in texts. **Alignment** changes the model so that its answers are the ones we want.
#
# There are three kinds of evidence about what we want:
#
# - **Demonstrations.** Somebody, the *expert*, wrote answers. The model can imitate them. This is called supervised fine-tuning, SFT.
# - **Preferences.** Somebody compared two answers and chose one. This says more than a demonstration, because it also says what is
#   worse.
# - **A reward.** A program or another model gives each answer a number. The model, now called the *policy*, can try answers and learn
#   which ones earn more. This is reinforcement learning, RL.
#
# A reward can be written down, learned from preferences, or, and this is what the project is about, learned from demonstrations alone.
# Whatever the evidence, the policy is held near the model from which it started, the *reference*. A reward is never perfect, and a
# policy that follows it without limits finds its mistakes.
#
# The arrows of this picture carry the numbers of the tutorials that build them.

# %%
start.pipeline(
    "00_pipeline.png",
    alt="Boxes for base model, policy, demonstrations, preferences, reward and completions; the "
    "arrows between them carry the numbers of the tutorials",
)

# %% [markdown]
# Tutorials 01 to 03 build the ground under it: a GPT, a sampler, and the log-probabilities of its answers. 10 and 10b make it fast and
# large. 11 does all of it with a small published model that tells stories.
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
# There are 24 things. A speaker chooses a polite opening with some probability, and independently a polite ending with the same
# probability. The three openings of a kind are equally likely, and so are the endings. The base model learned from rude speakers. The
# demonstrations come from a polite expert, with some rude ones among them.

# %%
print(f"a rude speaker is polite with probability {RUDE}, the expert with {EXPERT}\n")
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
# Each prompt has 6 · 6 = 36 sensible completions, and the probability of each one is known exactly. That is why we use this language:
# after training, we can compare the policy with the right answer, completion by completion.
#
# The language has a true reward too, the *gold* reward. It gives 1 for naming the thing, and for the opening and for the ending 1 each
# if polite, −1 if rude. Methods that learn from demonstrations or preferences never see it. We use it to judge them.

# %%
prompt = "ask for tea: "
for completion in ("may i have tea, please.", "may i have tea now!", "give me tea now!", "tee"):
    [reward] = gold_reward([prompt], [completion])
    p_rude, p_expert = (builtin_law(prompt, p).get(completion, 0.0) for p in (RUDE, EXPERT))
    print(f"{completion:26} reward {reward:4.0f}   rude {p_rude:.4f}   expert {p_expert:.4f}")

expert = builtin_law(prompt, EXPERT)  # {completion: probability}
always(len(expert) == 36, "There are six openings and six endings, so 36 completions.")
always(abs(sum(expert.values()) - 1) < 1e-12, "The probabilities of all completions sum to 1.")

# %% [markdown]
# Tutorials 06 and 06b use a second language that is smaller still. A completion is a few letters, so *all* completions can be listed,
# and expectations are sums instead of estimates.
#
# ## Two kinds of checks
#
# The tutorials check what they say. Each check carries a sentence for you, which appears if the check fails:
#
# - `always(…)` holds for any setting: a formula, or your function against the project's. If it fails, something is wrong.
#   `equal(…)` is the same for tensors.
# - `this_run(…)` holds for the printed settings, such as "the loss falls below 0.02". If you have changed a setting, a failure is a
#   result to think about, not an error. Set `checks.TINKER = True` (or run the script with `TINKER=1` before the command), and it is
#   printed instead of raised.

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
# - the **notebook** (`tutorials/notebooks/05_inverse_rl.ipynb`), already executed: read it in the browser, or run it in Jupyter;
# - the **script** (`python tutorials/05_inverse_rl.py`): it prints the same, and saves its figures in `runs/tutorials`;
# - the script **as cells**: VS Code, PyCharm and Jupyter (with jupytext) show "Run Cell" above each `# %%`.
#
# Lines that end with `# watch: name (shape)` deserve a breakpoint. A debugger stops *before* it runs a line. So stop there, step once
# (F10 in VS Code), and then look at `name`: its shape should be the one in the comment. In VS Code, "Debug Cell" steps through one
# cell. To step into the project's own functions, set `"justMyCode": false` in the launch configuration. In a terminal, `python -m pdb
# tutorials/01_gpt.py` does the same with `b 134`, `c`, `n` and `p scores.shape`.
#
# **Build it yourself.** The functions called `my_…` are the ones to write. `make exercises` writes `tutorials/exercises`, in which
# their bodies are blank. Read the text, write the body, run the checkpoint below it. What stood there is folded at the end of the file.
#
# ## Letters
#
# The shapes in comments use these letters: `B` sequences in a batch, `T` positions, `V` vocabulary, `C` channels, `N` prompts, `G`
# completions of one prompt. `logps` belongs to the policy, `ref_logps` to the reference, `old_logps` to the policy that sampled. All
# other words and letters are in the [glossary](../GLOSSARY.md). The ones to know before 01:

# %%
page = Path(checks.__file__).with_name("GLOSSARY.md").read_text(encoding="utf-8")
words = page.split("## Letters")[0]
print(words.count("<a id="), "words are explained there; the first of them:\n")
for entry in words.split("\n- ")[1:8]:
    print(" ".join(entry.split("</a>")[1].replace("**", "").replace("\\", "").split()))

# %% [markdown]
# ## Where things are
#
# `minialign/methods/` has one method per file: docstring, settings, loss, step, loop. `minialign/model.py`, `sample.py` and `logps.py`
# are the GPT, the sampler and the log-probs. `toy/` computes the right answers, `docs/` has the results. `python -m minialign` lists it
# all.
#
# Next: [01 · A GPT, from text to a loss](01_gpt.ipynb).
