"""minialign: language-model alignment from scratch, every loss in one readable file, each proved against its own fixed point.

The letters, once for the whole project:

    B  sequences in a batch          T  predictions per sequence     V  vocabulary
    C  channels (model width)        H  heads                        D  head width
    N  prompts                       G  completions per prompt, B = N·G, the G of one prompt adjacent
    L  layers

One layout: right padding. `inputs[:, t]` is seen, `targets[:, t]` is predicted; `logps[:, t]`, `mask[:, t]`, `values[:, t]`
and `kl[:, t]` all talk about that prediction. `mask[:, t]` is True iff `targets[:, t]` is a completion token, its EOS included.

The prefix rule: no prefix means the policy being trained; every other model puts its name in front (`logps`, `ref_logps`,
`old_logps`). A bare plural is per token (B, T); `seq_` is summed over the completion (B,); `chosen_logps` and `rejected_logps`
are (B,), as the papers write log π(y|x).

Start with `python -m minialign`; then open minialign/methods/sft.py.
"""

__version__ = "0.1.0"
