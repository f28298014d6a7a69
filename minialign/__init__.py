"""minialign: language-model alignment from scratch. Every loss is in one readable file and is checked against its own fixed point.

The letters used in the whole project:

    B  sequences in a batch          T  predictions per sequence     V  vocabulary
    C  channels (model width)        H  heads                        D  head width
    N  prompts                       G  completions per prompt, B = N·G; the G of one prompt are adjacent
    L  layers

There is one layout: right padding. The model sees `inputs[:, t]` and predicts `targets[:, t]`. `logps[:, t]`, `mask[:, t]`,
`values[:, t]` and `kl[:, t]` all belong to that prediction. `mask[:, t]` is True iff `targets[:, t]` is a completion token, EOS included.

The prefix rule: a name without a prefix belongs to the policy being trained. For every other model, its name comes first (`ref_logps`,
`old_logps`). A bare plural like `logps` is per token (B, T). With `seq_` it is summed over the completion (B,). `chosen_logps` and
`rejected_logps` are (B,), the log π(y|x) of the papers.

Start with `python -m minialign`. Then open minialign/methods/sft.py.
"""

__version__ = "0.1.0"
