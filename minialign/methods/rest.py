"""Reinforced self-training (ReST). Gulcehre et al. 2023, arXiv:2308.08998, Algorithm 1 and Eq. 3. (Not ReST-EM, not ReST-MCTS.)

    L(θ) = E_{(x, y) ~ D_g}[ 1[ r(x, y) > τ_i ] · (−log π_θ(y|x)) ] / P(r > τ_i),        D_g = completions of π_g, drawn once per Grow step

Symbols  D_g: the data set of a Grow step; π_g: the policy before that step → old; τ_1 < τ_2 < …: thresholds, one for each Improve step;
         log π_θ(y|x): the sum of logps (B, T).
Idea     Two loops. Grow: sample a data set from the policy and compute its rewards once. Improve: fine-tune on the samples whose reward
         is above a threshold, then on those of the same data set above a higher one. Sampling is rare, and every sample is used often.
Differs  from best_of_n.py: one threshold over all prompts instead of the best of each; a prompt may keep all of its completions or none.
         From rloo.py: samples below the threshold have no gradient. They become less likely only because others become more likely.
Details  The thresholds are quantiles of the Grow step's own rewards, so the scale of the reward need not be known (the paper begins above
         the mean; 0.5 is the median). Completions with reward τ are dropped. If nothing is left (many share the largest reward), those
         with the largest reward are kept.
         One threshold serves all prompts. A learned reward is known up to a constant per prompt, so this may select prompts, not answers.
         The paper's data set also contains the demonstrations that the policy was trained on. Here it contains only samples.
         There is no reference and no KL. Only the number of Grow steps limits how far the policy moves.
         The data set of a Grow step is not stored. A resumed run samples it again with the same policy and seed, and computes the rewards
         again. If the same text can get another reward the second time, the data set will be different.
         missing_eos is subtracted from r if max_new cut the completion off. Samples are drawn at temperature tau; the likelihood is at 1.
Law      If x has completions above τ_I, the last Improve step ends at π ∝ π_g·1[r > τ_I] for large data sets, with KL(π‖π_g) = −log P(r >
         τ_I | x) (toy/closed_form.py, rest_law). In a finite one, completions that were not sampled lose their probability too.
Checked  tests/methods/test_rest.py (thresholds, the guard, what is regenerated), toy/tiny_language.py (the law).

    python -m minialign rest                                                 # built-in task, laptop CPU
    python -m minialign rest --prompts prompts.jsonl --policy runs/sft/final --reward runs/reward_model/final --grows 2
"""

from dataclasses import dataclass, field

import torch
from torch.nn.utils import clip_grad_norm_

from minialign.batch import collate, masked_mean
from minialign.engine.common import BadInput, Mean, batch_rows, derive_seed, lr_at, set_lr
from minialign.engine.look import first_rollout
from minialign.engine.opening import open_online, open_optimizer
from minialign.engine.run import Run
from minialign.evaluate import held_out_reward
from minialign.logps import token_logps
from minialign.lora import frozen_copy
from minialign.rewards import rollout_stats
from minialign.sample import sample
from minialign.settings import OnPrompts


@dataclass
class Config(OnPrompts):
    grows: int = 1                  # number of Grow steps; each samples a new data set from the policy so far
    grow_prompts: int = 64          # prompts in a data set
    n: int = 8                      # completions of each prompt
    quantiles: list[float] = field(default_factory=lambda: [0.5, 0.7, 0.9])  # thresholds of the Improve steps, as quantiles of the rewards
    steps: int = 90                 # optimizer steps, divided evenly among all Improve steps of all Grow steps
    batch_size: int = 32            # completions per step, taken from those above the threshold
    reward_limit: float = 60.0      # seconds that the reward may take for a whole data set
    tau: float = 1.0                # sampling temperature
    lr: float = 3e-4                # peak learning rate (for models with billions of weights: 5e-7)
    schedule: str = "cosine"
    warmup: float = 0.1


def rest_loss(logps, mask):
    """Mean over the kept completions of −log π(y): logps, mask (B, T). Returns the scalar loss, stats."""
    assert logps.dim() == 2 and logps.shape == mask.shape, (logps.shape, mask.shape)
    loss = -torch.where(mask.bool(), logps, 0).sum(1).mean()
    return loss, {"nll": -masked_mean(logps, mask).detach()}


def keep(rewards, threshold):
    """(B,) bool: which rewards (B,) exceed the threshold or, if none does, equal the largest. Of .2 .5 .9 .7 at .575: the last two."""
    above = rewards > threshold
    return above if above.any() else rewards == rewards.max()


def step(policy, kept, cfg):
    """Evaluate the policy on kept completions and compute the loss. Only this function connects policy and equation."""
    return rest_loss(token_logps(policy, kept), kept.mask)


def main(cfg):
    """Run the method and return the run folder."""
    run = Run("rest", cfg)
    cfg = run.cfg
    if not cfg.quantiles or not all(0 <= q < 1 for q in cfg.quantiles) or sorted(set(cfg.quantiles)) != cfg.quantiles:
        raise BadInput(f"--quantiles {cfg.quantiles}: must increase, from at least 0 to below 1")
    phases = cfg.grows * len(cfg.quantiles)
    if phases > cfg.steps:
        raise BadInput(f"--steps {cfg.steps}: {cfg.grows} Grow steps with {len(cfg.quantiles)} Improve steps each need at least {phases}")
    reward_fn, policy, tokenizer, rows, held_out = open_online(run)
    old = frozen_copy(policy)  # π_g: the policy at the start of the Grow step
    optimizer = open_optimizer(cfg, policy)
    run.register(policy=policy, old=old, optimizer=optimizer)
    first_rollout(run, tokenizer, rows, reward_fn, {"policy": policy, "ref": old})

    data = None  # the data set of this Grow step: prompts, completions, rewards
    run.at_evaluation(policy, tokenizer, held_out or rows,
                      lambda: held_out_reward(policy, tokenizer, held_out, reward_fn, cfg), tau=cfg.tau)

    for k in run.steps(cfg.steps):
        phase, phase_before = k * phases // cfg.steps, (k - 1) * phases // cfg.steps
        g, i = divmod(phase, len(cfg.quantiles))
        if k and g != phase_before // len(cfg.quantiles):  # a Grow step begins
            old.load_state_dict(policy.state_dict())
            data = None

        if data is None:
            source = [j for j in batch_rows(len(rows), cfg.grow_prompts, g, cfg.seed) for _ in range(cfg.n)]  # prompt of each sample
            prompts_ids, prompts = zip(*[rows[j] for j in source], strict=True)
            answers = sample(old, prompts_ids[:: cfg.n], max_new=cfg.max_new, tau=cfg.tau, n=cfg.n, eos_id=tokenizer.eos_id,
                             seed=derive_seed("rest", cfg.seed, g))
            rewards = run.ask(k, reward_fn, tokenizer, prompts, answers)  # (B,)
            if rewards is None:
                continue
            data = source, prompts_ids, answers, rewards
        source, prompts_ids, answers, rewards = data
        threshold = torch.quantile(rewards, cfg.quantiles[i])
        kept = keep(rewards, threshold).nonzero().squeeze(1).tolist()
        picked = [kept[j] for j in batch_rows(len(kept), cfg.batch_size, k, cfg.seed)]
        batch = collate([prompts_ids[j] for j in picked], [answers.completions[j] for j in picked], pad_id=tokenizer.pad_id).to(run.device)

        set_lr(optimizer, lr_at(k, lr=cfg.lr, steps=cfg.steps, warmup=cfg.warmup, schedule=cfg.schedule))
        optimizer.zero_grad()
        losses, stats = [], Mean()
        for micro in batch.micro_batches(cfg.micro_batch):
            loss, micro_stats = step(policy, micro, cfg)
            share = len(micro) / len(batch)  # the loss is a mean over completions: a micro-batch is weighted by its number of them
            loss = loss * share
            loss.backward()
            losses.append(loss.detach())
            stats.add(micro_stats, weight=micro.mask.sum())  # means over tokens
        total = run.sum(losses)
        grad_norm = clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
        if run.may_update(k, policy, [source[j] for j in picked], total, grad_norm):
            optimizer.step()

        metrics = rollout_stats(rewards, answers, group_size=cfg.n)
        metrics |= {"reward/kept": rewards[kept].mean(), "threshold": threshold, "kept": len(kept) / len(rewards), "grow": g, "improve": i}
        metrics |= {"loss": total, "grad_norm": grad_norm, "lr": optimizer.param_groups[0]["lr"], **stats.result()}
        run.end_of_step(k, metrics)
    return run.close(policy, tokenizer)
