"""A GPT on a language small enough to enumerate: every method against its own fixed point, computed by exact sums, not by sampling.

The language has four content tokens and EOS, and a completion has at most three tokens. So a prompt has 1 + 4 + 16 + 64 = 85 completions
(with --full six tokens, length four and 1555 completions), and every probability, expectation and divergence is a finite sum. The reward
is a rule: +.5 for each token the prompt likes, −.5 for each it dislikes, −.4 for each immediate repetition, +.3 for ending with EOS.
(Random rewards would not work: a net this small cannot tilt 1555 completions one by one, and its error would hide the method's error.)

Each method is tested in two ways, with its own functions from minialign/methods:

    at rest    a policy is set to the method's law; its expected update, summed over all completions, must be 0
    trained    the GPT of minialign/model.py trains by sampling, with the method's own rollout, advantages and step in the order of its main
               (Adam, no gradient clipping, one learning rate); then KL(π‖law), summed over all completions, must be small

The laws are those of toy/closed_form.py. The law of REINFORCE, RLOO, PPO and REBEL is π* ∝ ref·e^{r/β}. RFT and IRL see only
demonstrations of π* and must find it too, and so must DPO and GPO with Savage's f. GRPO, IFT, RFT by Bradley-Terry and most relatives of
DPO have other laws and must end nearer to those than to π*. For a method without a closed form, the expected slope at the end must be small
compared with the slope at ref.

    python -m toy.tiny_language                                        # all at rest, a few trained; a figure; exit 1 on a miss
    python -m toy.tiny_language --full                                 # all trained, on 1555 completions: seven minutes
    python -m toy.tiny_language --methods rloo grpo --seeds 5

Why both? With the KL in the reward the advantages are constant at π*, so training ends there even if they are wrong by a factor. And being
at rest alone is not enough: training must get there. tests/test_wrong_variants.py shows which test catches which mistake.
"""

import copy
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from minialign.batch import collate
from minialign.data import demo_batch, pair_batch
from minialign.engine.common import BadInput, Mean, batch_rows, commit, derive_seed, figure_path, write_atomic
from minialign.kl import kl_rewards
from minialign.methods import best_of_n, dpo, gpo, grpo, ift, ipo, irl, kto, orpo, ppo, rebel, reinforce, rest, rft, rloo, simpo, slic
from minialign.model import GPT, GPTConfig
from minialign.pairs import label_by_reward
from minialign.rewards import score
from minialign.sample import rollout, sample
from minialign.settings import cli, exit_codes
from toy import closed_form


@dataclass
class Config:
    methods: list[str] = field(default_factory=list)  # methods to train: all, or some of reinforce, rloo, …; default: a few, --full all
    beta: float = 0.5               # strength of the pull to the reference
    steps: int = 300                # updates per run (PPO: a third as many rollouts, four updates on each; RFT, IRL: twice as many updates)
    samples: int = 32               # completions per prompt and step (REBEL, preferences and KTO: twice as many pairs)
    lr: float = 3e-3                # Adam's learning rate, which falls linearly to 0
    seeds: int = 1                  # runs per row; every run must pass
    full: bool = False              # 1555 completions per prompt instead of 85, twice the updates, every method
    out: str = "runs/tiny_language.png"  # the figure


# ------------------------------------------------------------------------------------------------------------- the language


def all_completions(n_content, eos_id, max_new):
    """Every completion that a sampler can return, as lists of ids, shortest first. Content ids are 0 … n_content without eos_id."""
    content = [token for token in range(n_content + 1) if token != eos_id]
    ended = [[*words, eos_id] for length in range(max_new) for words in product(content, repeat=length)]
    return ended + [list(words) for words in product(content, repeat=max_new)]


def tiny_gpt(vocab_size, *, seed=0, dtype=torch.float64, mixing=1.0, **changes):
    """A one-layer GPT-2 with 32 channels. Its distribution is not flat and depends on the whole prefix. The global seed is not changed.

    Embeddings have standard deviation 0.3 and the head 1/sqrt(its inputs). With GPT-2's 0.02 all tokens would be about equally likely. The
    matrices between them have `mixing`/sqrt(their inputs): 1 makes the prefix matter a lot, a smaller value makes the net easier to train.
    """
    shape = dict(n_layer=1, n_head=2, n_embd=32, max_len=16, norm="layer", activation="gelu_tanh", gated=False, positions="learned",
                 qkv_bias=True, out_bias=True, mlp_bias=True, tied=False, family="gpt2")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = GPT(GPTConfig(vocab_size, **{**shape, **changes})).to(dtype)
        for name, parameter in policy.named_parameters():
            if parameter.dim() == 2:
                std = 0.3 if "embed" in name else parameter.shape[1] ** -0.5
                torch.nn.init.normal_(parameter, std=std * (mixing if "blocks" in name else 1))
    return policy


class Language:
    """The completions of a few one-token prompts, their rewards, and the exact log-probs of these completions under a policy."""

    def __init__(self, n_content=6, max_new=4, n_prompts=3):
        self.eos_id, self.vocab_size, self.max_new = n_content, n_content + 1, max_new
        self.prompts = [[token] for token in range(n_prompts)]
        self.completions = [tuple(y) for y in all_completions(n_content, self.eos_id, max_new)]
        self.index = {y: c for c, y in enumerate(self.completions)}
        self.lengths = torch.tensor([len(y) for y in self.completions])  # (C,)
        self.rewards = torch.tensor([[self.reward(x[0], y) for y in self.completions] for x in self.prompts], dtype=torch.float64)  # (N, C)

        # One causal forward pass over the n_content^(max_new − 1) longest prefixes gives every conditional. Completion c is read from the
        # row of any longest prefix that starts like c.
        self.mask = torch.arange(max_new) < self.lengths[:, None]  # (C, T)
        self.tokens = torch.tensor([[*y, *[0] * (max_new - len(y))] for y in self.completions])  # (C, T)
        prefixes = list(product(range(n_content), repeat=max_new - 1))
        row_of = {prefix: row for row, prefix in enumerate(prefixes)}
        inside = torch.where(self.tokens == self.eos_id, 0, self.tokens)[:, : max_new - 1]
        self.rows = torch.tensor([row_of[tuple(prefix)] for prefix in inside.tolist()])  # (C,)
        self.inputs = torch.tensor([[[*x, *prefix] for prefix in prefixes] for x in self.prompts])  # (N, prefixes, T)

    def reward(self, prompt, completion):
        content = [token for token in completion if token != self.eos_id]
        liked, disliked = content.count(prompt), content.count((prompt + 3) % (self.vocab_size - 1))
        repeats = sum(a == b for a, b in zip(content, content[1:], strict=False))
        reward = 0.5 * liked - 0.5 * disliked - 0.4 * repeats + 0.3 * (completion[-1] == self.eos_id)
        return round(reward, 9)  # rewards summed in another order must stay equal, because selection looks for ties

    def token_logps(self, policy):
        """(N, C, T): log π of every token of every completion of every prompt; 0 after its end. Gradients flow."""
        all_logps = policy(self.inputs.flatten(0, 1)).log_softmax(-1).unflatten(0, self.inputs.shape[:2])  # (N, prefixes, T, V)
        steps = torch.arange(self.max_new)
        return torch.where(self.mask, all_logps[:, self.rows[:, None], steps, self.tokens], 0)

    @torch.no_grad()
    def law_of(self, policy):
        """(N, C) probabilities, float64."""
        return self.token_logps(policy).double().sum(-1).exp()

    def conditionals(self, law):
        """(C, T): log of each token's probability given the tokens before it, under the distribution `law` (C,); 0 after the end."""
        mass = {}
        for y, p in zip(self.completions, law.tolist(), strict=True):
            for t in range(len(y) + 1):
                mass[y[:t]] = mass.get(y[:t], 0.0) + p

        def logp(y, t):  # if the prefix itself never occurs, any value will do
            return math.log(mass[y[: t + 1]] / mass[y[:t]]) if mass[y[: t + 1]] else -math.inf if mass[y[:t]] else -1.0

        rows = [[logp(y, t) if t < len(y) else 0.0 for t in range(self.max_new)] for y in self.completions]
        return torch.tensor(rows, dtype=torch.float64)

    def exact_values(self, law, token_rewards):
        """(C, T): E[rewards from t on | the tokens before t] for token_rewards (C, T) and a distribution law (C,): a perfect critic."""
        to_come = token_rewards.flip(1).cumsum(1).flip(1)  # (C, T) return from token t on
        values = torch.zeros_like(token_rewards)
        for t in range(self.max_new):
            sums = {}
            here = [c for c, y in enumerate(self.completions) if len(y) > t]
            for c in here:
                mass, total = sums.get(self.completions[c][:t], (0.0, 0.0))
                sums[self.completions[c][:t]] = (mass + float(law[c]), total + float(law[c] * to_come[c, t]))
            for c in here:
                mass, total = sums[self.completions[c][:t]]
                values[c, t] = total / mass
        return values

    def draw(self, law, n, generator):
        """Sample n completions per prompt from the distribution `law` (N, C), grouped by prompt: an object with .completions."""
        drawn = torch.multinomial(law, n, replacement=True, generator=generator).flatten().tolist()
        return SimpleNamespace(completions=[list(self.completions[c]) for c in drawn])

    def scores(self, prompts_ids, answers):
        """(B,) rewards of sampled completions."""
        pairs = zip(prompts_ids, answers.completions, strict=True)
        return torch.tensor([self.rewards[x[0], self.index[tuple(y)]] for x, y in pairs], dtype=torch.float32)


class TabularPolicy:
    """One logit per (prefix, token), so it can be any distribution exactly. Its logits are the logs of the conditionals of `law`."""

    def __init__(self, language, law):
        places = {}
        conditionals, self.language = language.conditionals(law), language
        self.where = torch.zeros(len(language.completions), language.max_new, dtype=torch.long)
        for c, y in enumerate(language.completions):
            for t in range(len(y)):
                self.where[c, t] = places.setdefault(y[:t], len(places))
        logits = torch.zeros(len(places), language.vocab_size, dtype=torch.float64)
        logits[self.where[language.mask], language.tokens[language.mask]] = conditionals[language.mask]  # this sets every logit
        self.logits = logits.requires_grad_(True)

    def token_logps(self):
        chosen = self.logits.log_softmax(-1)[self.where, self.language.tokens]
        return torch.where(self.language.mask, chosen, 0)  # (C, T)


# --------------------------------------------------------------------------------------------------- the rows of the table


@dataclass
class Row:
    name: str
    method: str
    law: callable       # (language, ref (N, C), beta) -> (N, C): the policy it must converge to; None if there is no closed form
    expected: callable  # (logps (C, T), ref_logps, rewards (C,), law (C,), language, beta) -> the expected loss, over all completions
    losses: callable    # (policy, value_model, ref, language, cfg, seed) -> the losses of the sampled run, one per update
    gate: float         # bound on KL(π‖law) for a correct implementation (without a law: on the slope that is left, as a share of ref's)
    reward_gate: float = math.inf  # bound on |E_π[r] − E_law[r]|
    forward: bool = False  # measure KL(law‖π), because KL(π‖law) is infinite where the law is 0
    elsewhere: bool = False  # its law is not π*: it must end nearer to its law than to π*, by at least a factor of 2 in KL


def tilted(language, ref, beta):
    return np.stack([closed_form.tilt(ref[n], r, beta) for n, r in enumerate(language.rewards.numpy())])


# Expectations. A loss is a mean over its C rows. Advantages multiplied by w = C·π(y) turn it into Σ_y π(y)·(…).


def expected_reinforce(logps, ref_logps, rewards, law, language, beta):
    rewards = kl_rewards(rewards, logps, ref_logps, beta=beta)
    return reinforce.reinforce_loss(logps, rewards * law * len(law), language.mask)[0]


def expected_rloo(logps, ref_logps, rewards, law, language, beta):
    rewards = kl_rewards(rewards, logps, ref_logps, beta=beta)
    advantages = rewards - law @ rewards  # the expectation of leave_one_out for each completion
    return rloo.rloo_loss(logps, logps.detach(), advantages * law * len(law), language.mask, eps=0.2)[0]


def expected_ppo(logps, ref_logps, rewards, law, language, beta):
    token_rewards = ppo.shape_rewards(rewards, logps, ref_logps, language.mask, beta=beta)
    advantages, _ = ppo.gae(token_rewards, language.exact_values(law, token_rewards), language.mask, gamma=1.0, lam=0.95)
    return ppo.policy_loss(logps, logps.detach(), advantages * law[:, None] * len(law), language.mask, eps=0.2)[0]


def expected_rebel(logps, ref_logps, rewards, law, language, beta):
    rewards = kl_rewards(rewards, logps, ref_logps, beta=beta)
    logratio = (logps - logps.detach()).sum(1)
    y, other = torch.cartesian_prod(torch.arange(len(law)), torch.arange(len(law))).T  # every pair
    root = (law[y] * law[other]).sqrt() * len(law)  # square roots, because the loss squares them
    return rebel.rebel_loss(root * logratio[y], root * logratio[other], root * rewards[y], root * rewards[other], eta=1.0)[0]


def expected_grpo(group_size, logps, ref_logps, rewards, law, language, beta):
    advantages = (group_size - 1) / group_size * (rewards - law @ rewards)  # the expectation of group_advantages with normalize=False
    weight = law * len(law)
    return grpo.grpo_loss(logps, logps.detach(), ref_logps, advantages * weight, language.mask, eps=0.2, beta=beta * weight[:, None],
                          aggregate="dr_grpo", max_len=language.max_new)[0]


def expected_paper_grpo(logps, ref_logps, rewards, law, language, beta):
    mean = law @ rewards
    advantages = (rewards - mean) / (law @ (rewards - mean) ** 2).sqrt()  # for large groups
    weight = law * len(law)
    return grpo.grpo_loss(logps, logps.detach(), ref_logps, advantages * weight, language.mask, eps=0.2, beta=beta * weight[:, None])[0]


# Sampled runs: the loop of each method's main, without its run folder. Each yields a loss and continues after the update.


def reinforce_losses(policy, value_model, ref, language, cfg, seed):
    settings = reinforce.Config(beta=cfg.beta, max_new=language.max_new)
    baseline = reinforce.Baseline(settings.decay)
    prompts_ids = [x for x in language.prompts for _ in range(cfg.samples)]
    for k in range(cfg.steps):
        answers = rollout(policy, ref, prompts_ids, settings, eos_id=language.eos_id, seed=(seed, k))
        rewards = kl_rewards(language.scores(prompts_ids, answers), answers.old_logps, answers.ref_logps, beta=cfg.beta)
        answers.advantages = rewards - baseline.value
        baseline.update(rewards)
        yield reinforce.step(policy, answers, settings)[0]


def rloo_losses(policy, value_model, ref, language, cfg, seed):
    settings = rloo.Config(beta=cfg.beta, max_new=language.max_new, group_size=4)
    prompts_ids = [x for x in language.prompts for _ in range(cfg.samples)]
    for k in range(cfg.steps):
        answers = rollout(policy, ref, prompts_ids[::4], settings, n=4, eos_id=language.eos_id, seed=(seed, k))
        rewards = kl_rewards(language.scores(prompts_ids, answers), answers.old_logps, answers.ref_logps, beta=cfg.beta)
        answers.advantages = rloo.leave_one_out(rewards, group_size=4)
        yield rloo.step(policy, answers, settings, on_policy=True)[0]


def ppo_losses(policy, value_model, ref, language, cfg, seed):
    settings = ppo.Config(beta=cfg.beta, max_new=language.max_new)
    prompts_ids = [x for x in language.prompts for _ in range(cfg.samples)]
    for k in range(cfg.steps // 3):  # fewer rollouts, but four updates on each
        answers = ppo.rollout_with_values(policy, value_model, ref, prompts_ids, settings, language.eos_id, (seed, k))
        ppo.credit(answers, language.scores(prompts_ids, answers), settings)
        for epoch in range(settings.epochs):
            loss, critic_loss, _ = ppo.step(policy, value_model, answers, settings, on_policy=epoch == 0)
            yield loss + critic_loss


def rebel_losses(policy, value_model, ref, language, cfg, seed):
    settings = rebel.Config(beta=cfg.beta, max_new=language.max_new, eta=1.0, epochs=20)
    prompts_ids = [x for x in language.prompts for _ in range(4 * cfg.samples)]
    for k in range(cfg.steps // settings.epochs):
        answers = rollout(policy, ref, prompts_ids[::2], settings, n=2, eos_id=language.eos_id, seed=(seed, k))
        scores = language.scores(prompts_ids, answers)
        answers.rewards = kl_rewards(scores, answers.old_logps, answers.ref_logps, beta=cfg.beta)
        for epoch in range(settings.epochs):
            yield rebel.step(policy, answers, settings, on_policy=epoch == 0)[0]


def grpo_losses(settings, policy, value_model, ref, language, cfg, seed):
    prompts_ids = [x for x in language.prompts for _ in range(cfg.samples)]
    for k in range(cfg.steps):
        size = settings.group_size
        answers = rollout(policy, ref, prompts_ids[::size], settings, n=size, eos_id=language.eos_id, seed=(seed, k))
        answers.advantages = grpo.group_advantages(language.scores(prompts_ids, answers), group_size=size, normalize=settings.normalize,
                                                   ddof=settings.ddof, std_eps=settings.std_eps)
        yield grpo.step(policy, answers, settings, on_policy=True)[0]


def grpo_row(group_size):
    """GRPO without division by standard deviation or length: the k3 law, where a group of size G turns beta into beta·G/(G − 1)."""

    def law(language, ref, beta):
        pull = np.full(len(language.completions), beta * group_size / (group_size - 1))
        return np.stack([closed_form.token_k3_law(language.completions, ref[n], r, pull) for n, r in enumerate(language.rewards.numpy())])

    def losses(policy, value_model, ref, language, cfg, seed):
        settings = grpo.Config(beta=cfg.beta, max_new=language.max_new, group_size=group_size, normalize=False, aggregate="dr_grpo")
        return grpo_losses(settings, policy, value_model, ref, language, cfg, seed)

    def expected(*args):
        return expected_grpo(group_size, *args)

    return Row(f"GRPO, dr_grpo, no spread, G = {group_size}", "grpo", law, expected, losses, 0.015, elsewhere=True)


def paper_grpo_law(language, ref, beta):
    rewards = language.rewards.numpy()
    return np.stack([closed_form.group_normalised_law(language.completions, ref[n], r, beta) for n, r in enumerate(rewards)])


def paper_grpo_losses(policy, value_model, ref, language, cfg, seed):
    settings = grpo.Config(beta=cfg.beta, max_new=language.max_new, group_size=cfg.samples)  # one large group
    return grpo_losses(settings, policy, value_model, ref, language, cfg, seed)


# From demonstrations. The expert is π* itself, E ∝ ref·e^{r/β}, and gives as many completions as the other methods sample.


def ift_law(language, ref, beta):
    return np.stack([closed_form.ift_law(language.completions, expert, ift.Config.decay) for expert in tilted(language, ref, beta)])


def expected_ift(logps, ref_logps, rewards, law, language, beta):
    expert = torch.tensor(closed_form.tilt(ref_logps.sum(1).exp().numpy(), rewards.numpy(), beta))
    weighted = logps * (expert * len(expert))[:, None]  # a factor does not change a row's weights, so it scales the row's loss
    return ift.ift_loss(weighted, language.mask, decay=ift.Config.decay)[0]


def ift_losses(policy, value_model, ref, language, cfg, seed):
    settings = ift.Config(mix=0.0)
    generator = torch.Generator().manual_seed(seed)
    expert = torch.tensor(tilted(language, language.law_of(ref).numpy(), cfg.beta))
    prompts_ids = [x for x in language.prompts for _ in range(cfg.samples)]
    for _ in range(cfg.steps):
        completions = language.draw(expert, cfg.samples, generator).completions
        yield ift.step(policy, collate(prompts_ids, completions, pad_id=language.eos_id), settings)[0]


# Inverse RL. The reward model is a GPT that sums one number per token, and the policy is trained on it by RLOO. The two take turns. In RFT
# a turn is 2 reward updates, then 4 policy updates. IRL has 3 rounds; each trains an increase of the reward for long, then the policy.
# With β = 1 its law is the expert after every round (with the toy's β = ½ it would oscillate). At rest the policy is the expert (or RFT's
# mixture) and the reward is β·log π/ref. The expected gradient is taken there, for the tabular reward of the tabular policy.


def mixture(language, ref, beta):
    """The law of Bradley-Terry in small steps: not the expert, but between it and ref."""
    return np.stack([closed_form.geometric_mixture(expert, ref[n], beta) for n, expert in enumerate(tilted(language, ref, beta))])


def expected_inverse_rl(loss_of, logps, ref_logps, rewards, law, language, beta):
    """loss_of(demo_rewards, sample_rewards) -> a mean over rows. Its slopes at rest, weighted by E and law, are the expected gradient."""
    expert = torch.tensor(closed_form.tilt(ref_logps.sum(1).exp().numpy(), rewards.numpy(), beta))
    return over_pairs(loss_of, beta * (logps - ref_logps).sum(1), torch.outer(expert, law))


def over_pairs(loss_of, scores, weight):
    """A value with the gradient of Σ_ab weight[a, b]·loss(scores[a], scores[b]) in the scores (C,). loss_of takes the mean over rows."""
    a, b = torch.cartesian_prod(torch.arange(len(scores)), torch.arange(len(scores))).T  # every pair
    at = [scores[a].detach().requires_grad_(True), scores[b].detach().requires_grad_(True)]
    slopes = torch.autograd.grad(loss_of(*at) * len(a), at)
    return (weight.flatten() * (slopes[0] * scores[a] + slopes[1] * scores[b])).sum()


def inverse_rl_losses(round_length, reward_steps, reward_loss, beta, policy, reward_model, ref, language, cfg, seed):
    """Rounds of round_length updates; the first reward_steps of them train the reward. reward_loss(reward_model, base, demos, own)."""
    reward_model.config.reward_read = "sum"
    torch.nn.init.zeros_(reward_model.head_weight)  # r_0 = 0: π_0 = ref
    generator = torch.Generator().manual_seed(seed)
    expert = torch.tensor(tilted(language, language.law_of(ref).numpy(), cfg.beta))
    prompts_ids = [x for x in language.prompts for _ in range(cfg.samples)]
    settings = rft.Config(beta=beta, max_new=language.max_new)

    @torch.no_grad()
    def reward_of(answers):
        return score(reward_model, answers)

    for k in range(2 * cfg.steps):
        if k % round_length == 0:
            base = copy.deepcopy(reward_model)
        if k % round_length < reward_steps:
            completions = language.draw(expert, cfg.samples, generator).completions
            own = sample(policy, prompts_ids, max_new=settings.max_new, eos_id=language.eos_id, seed=(seed, k))
            yield reward_loss(reward_model, base, collate(prompts_ids, completions, pad_id=language.eos_id), own)
        else:
            grouped = prompts_ids[:: settings.group_size]
            _, _, update = rft.policy_alignment(policy, None, ref, grouped, reward_of, settings, language.eos_id, (seed, k))
            yield from (loss for loss, _ in update(0, Mean()))


def rft_row(loss, law, gate, reward_gate):
    def expected(logps, ref_logps, rewards, law, language, beta):
        def loss_of(demo, own):
            return rft.reward_alignment_loss(demo, own, beta=beta, loss=loss)[0]

        return expected_inverse_rl(loss_of, logps, ref_logps, rewards, law, language, beta)

    def losses(policy, reward_model, ref, language, cfg, seed):
        def reward_loss(reward_model, base, demos, own):
            return rft.step(reward_model, demos, own, rft.Config(beta=cfg.beta, loss=loss))[0]

        return inverse_rl_losses(6, 2, reward_loss, cfg.beta, policy, reward_model, ref, language, cfg, seed)

    return Row(f"RFT, {loss}, demonstrations of π*", "rft", law, expected, losses, gate, reward_gate, elsewhere=law is mixture)


def expected_irl(logps, ref_logps, rewards, law, language, beta):
    def loss_of(demo, own):
        return irl.irl_loss(demo, own, demo, own)[0]  # base = reward: the increase is 0 at rest

    return expected_inverse_rl(loss_of, logps, ref_logps, rewards, law, language, beta)


def irl_losses(policy, reward_model, ref, language, cfg, seed):
    def reward_loss(reward_model, base, demos, own):
        return irl.step(reward_model, base, demos, own, irl.Config(mode="accumulate", beta=1.0))[0]

    rounds = 2 * cfg.steps // 3, cfg.steps // 4
    return inverse_rl_losses(*rounds, reward_loss, 1.0, policy, reward_model, ref, language, cfg, seed)


# From preferences. ref samples the pairs (online: the policy itself), and Bradley-Terry on the reward labels them.


def from_pairs(law_of):
    """From law_of(ref (C,), reward (C,), prefer (C, C), beta, lengths (C,)) -> (C,), make the law of a row."""

    def law(language, ref, beta):
        rows, lengths = zip(ref, language.rewards.numpy(), strict=True), language.lengths.numpy()
        return np.stack([law_of(p, r, closed_form.bradley_terry(r), beta, lengths) for p, r in rows])

    return law


def preference_row(name, method, law, gate, *, settings=lambda beta: {"beta": beta}, online=False, average=False):
    """settings(beta) -> the fields of the method's Config. average: the loss takes log-probs averaged over the tokens, and no ref."""
    module = {"dpo": dpo, "ipo": ipo, "gpo": gpo, "simpo": simpo, "orpo": orpo, "slic": slic}[method]
    loss = getattr(module, f"{method}_loss")

    def expected(logps, ref_logps, rewards, law, language, beta):
        given, mu = settings(beta), law if online else ref_logps.sum(1).exp()
        weight = torch.outer(mu, mu) * torch.tensor(closed_form.bradley_terry(rewards.numpy()))
        scores = logps.sum(1) / (language.lengths if average else 1)
        if method == "slic":
            return over_pairs(lambda w, l: loss(w, l, w, **given)[0], scores, weight)
        if average:
            return over_pairs(lambda w, l: loss(w, l, **given)[0], scores, weight)
        zero = torch.zeros(len(law) ** 2, dtype=scores.dtype)  # log-ratios instead of log-probs
        return over_pairs(lambda w, l: loss(w, l, zero, zero, **given)[0], scores - ref_logps.sum(1), weight)

    def losses(policy, value_model, ref, language, cfg, seed):
        given = module.Config(**settings(cfg.beta), max_new=language.max_new)
        prompts_ids = [x for x in language.prompts for _ in range(2 * cfg.samples)]
        generator, written = torch.Generator().manual_seed(seed), language.law_of(ref)
        for k in range(cfg.steps):
            if online:
                answers = sample(policy, prompts_ids, max_new=language.max_new, n=2, eos_id=language.eos_id, seed=(seed, k))
            else:
                answers = language.draw(written, 4 * cfg.samples, generator)
            rewards = language.scores([x for x in prompts_ids for _ in range(2)], answers)
            rows = label_by_reward(prompts_ids, answers.completions, rewards, derive_seed(seed, k))
            pairs = pair_batch(rows, range(len(rows)), pad_id=language.eos_id, max_len=1 + language.max_new)
            yield module.step(policy, ref, pairs, given)[0]

    return Row(name, method, law, expected, losses, gate, elsewhere=law not in (tilted, None))


def expected_kto(logps, ref_logps, rewards, law, language, beta):
    mu = ref_logps.sum(1).exp()
    good, bad = (torch.tensor(share) / 2 for share in closed_form.winners(mu.numpy(), closed_form.bradley_terry(rewards.numpy())))
    scores, ref_scores = logps.sum(1), ref_logps.sum(1)
    kl = kto.mismatched_kl(((good + bad) * scores).sum()[None], ((good + bad) * ref_scores).sum()[None])
    loss = 0
    for share, desirable in ((good, True), (bad, False)):
        at = scores.detach().requires_grad_(True)
        labels = torch.full(scores.shape, desirable)
        (slopes,) = torch.autograd.grad(kto.kto_loss(at, ref_scores, labels, kl, beta=beta)[0] * len(at), at)
        loss = loss + (share * slopes * scores).sum()
    return loss


def kto_losses(policy, value_model, ref, language, cfg, seed):
    settings = kto.Config(beta=cfg.beta, max_new=language.max_new)
    prompts_ids = [x for x in language.prompts for _ in range(2 * cfg.samples)]
    generator, written = torch.Generator().manual_seed(seed), language.law_of(ref)

    def batch_of(source, picked):
        return demo_batch(source, picked, pad_id=language.eos_id, max_len=1 + language.max_new)

    for k in range(cfg.steps):
        answers = language.draw(written, 4 * cfg.samples, generator)
        rewards = language.scores([x for x in prompts_ids for _ in range(2)], answers)
        pairs = label_by_reward(prompts_ids, answers.completions, rewards, derive_seed(seed, k))
        rows = [(x, chosen, True) for x, chosen, _ in pairs] + [(x, rejected, False) for x, _, rejected in pairs]
        desirable = torch.tensor([label for *_, label in rows])
        kl = kto.reference_point(policy, ref, rows, batch_of, len(rows))  # sorted by prompt, so mismatched within a prompt, as above
        yield kto.step(policy, ref, batch_of(rows, range(len(rows))), desirable, kl, settings)[0]


# By selection, from ref's completions: best of 4, and ReST with one Grow step, half as many samples as the others see, and threshold 0. A
# likelihood is at rest on any data it is fitted to, so "at rest" tests little here. Training tests these rows, by KL and by mean reward.


def best_of_4(ref, reward):
    return closed_form.best_of_n_law(ref, reward, 4)


def above_0(ref, reward):
    return closed_form.rest_law(ref, reward, 0.0)


def selected(select):
    """(law, expected) of a row whose policy is fitted to select(ref, reward) by maximum likelihood."""

    def law(language, ref, beta):
        return np.stack([select(ref[n], r) for n, r in enumerate(language.rewards.numpy())])

    def expected(logps, ref_logps, rewards, law, language, beta):
        shown = torch.tensor(select(ref_logps.sum(1).exp().numpy(), rewards.numpy()))
        seen = torch.where(shown[:, None] > 0, logps, 0)  # 0·log 0 = 0
        return best_of_n.best_of_n_loss(seen * (shown * len(shown))[:, None], language.mask)[0]

    return law, expected


def best_of_n_losses(policy, value_model, ref, language, cfg, seed):
    settings = best_of_n.Config(n=4, max_new=language.max_new)
    prompts_ids = [x for x in language.prompts for _ in range(cfg.samples)]
    for k in range(cfg.steps):
        answers = sample(ref, prompts_ids, max_new=settings.max_new, n=settings.n, eos_id=language.eos_id, seed=(seed, k))
        scores = language.scores([x for x in prompts_ids for _ in range(4)], answers).view(-1, 4)
        completions = [answers.completions[4 * b + i] for b, i in enumerate(best_of_n.pick(scores).tolist())]
        yield best_of_n.step(policy, collate(prompts_ids, completions, pad_id=language.eos_id), settings)[0]


def rest_losses(policy, value_model, ref, language, cfg, seed):
    settings = rest.Config(n=cfg.steps * cfg.samples // 2, max_new=language.max_new)
    answers = sample(ref, language.prompts, max_new=settings.max_new, n=settings.n, eos_id=language.eos_id, seed=seed)
    prompts_ids = [x for x in language.prompts for _ in range(settings.n)]
    kept = rest.keep(language.scores(prompts_ids, answers), 0.0).nonzero().squeeze(1).tolist()
    for k in range(cfg.steps):
        picked = [kept[j] for j in batch_rows(len(kept), cfg.samples * len(language.prompts), k, seed)]
        rows = collate([prompts_ids[j] for j in picked], [answers.completions[j] for j in picked], pad_id=language.eos_id)
        yield rest.step(policy, rows, settings)[0]


FEW = ("rloo", "grpo", "ppo", "rebel", "ift", "dpo", "ipo")  # trained by default; takes a minute

# Gates: bounds that a correct implementation meets for all seeds and references, at the default beta and steps. They are wider than one
# run needs because training is noisy and a net has a floor: even the exact gradient of E[r] − β·KL ends at KL .0005. For selection the
# floor is higher: its laws jump between levels of reward (ReST's to 0), and a smooth net rounds the edges.
ROWS = [
    Row("REINFORCE, running-mean baseline", "reinforce", tilted, expected_reinforce, reinforce_losses, 0.008),
    Row("RLOO, G = 4", "rloo", tilted, expected_rloo, rloo_losses, 0.003),
    Row("PPO, λ = .95, 4 epochs", "ppo", tilted, expected_ppo, ppo_losses, 0.02),
    Row("REBEL, η = 1, 20 epochs", "rebel", tilted, expected_rebel, rebel_losses, 0.003),
    grpo_row(32),
    grpo_row(4),
    Row("GRPO as printed (law: G → ∞)", "grpo", paper_grpo_law, expected_paper_grpo, paper_grpo_losses, 0.06, elsewhere=True),
    Row("Best of 4, then SFT", "best_of_n", *selected(best_of_4), best_of_n_losses, 0.08, reward_gate=0.03),
    Row("ReST, r > 0, KL(law‖π)", "rest", *selected(above_0), rest_losses, 0.35, reward_gate=0.03, forward=True),
    Row("IFT, λ = 0, demonstrations of π*", "ift", ift_law, expected_ift, ift_losses, 0.02, elsewhere=True),
    rft_row("linear", tilted, 0.1, 0.08),
    rft_row("bt", mixture, 0.06, 0.08),
    Row("IRL, accumulate, 3 rounds, β = 1", "irl", tilted, expected_irl, irl_losses, 0.1, reward_gate=0.08),
    preference_row("DPO", "dpo", tilted, 0.03),
    preference_row("DPO, online", "dpo", tilted, 0.08, online=True),
    preference_row("IPO", "ipo", from_pairs(lambda ref, r, prefer, beta, _: closed_form.ipo_law(ref, prefer, beta, ref)), 0.006),
    preference_row("IPO, online", "ipo", from_pairs(lambda ref, r, prefer, beta, _: closed_form.ipo_online_law(ref, prefer, beta)), 0.006,
                   online=True),
    preference_row("GPO, savage", "gpo", tilted, 0.08, settings=lambda beta: {"beta": beta, "f": "savage"}),
    preference_row("GPO, exponential", "gpo", from_pairs(lambda ref, r, prefer, beta, _: closed_form.tilt(ref, r, 2 * beta)), 0.03,
                   settings=lambda beta: {"beta": beta, "f": "exponential"}),
    preference_row("GPO, squared", "gpo", from_pairs(lambda ref, r, prefer, beta, _: closed_form.ipo_law(ref, prefer, beta / 2, ref)), 0.03,
                   settings=lambda beta: {"beta": beta, "f": "squared"}),
    # Lengths multiply r/scale. With scale β the law would be too sharp to be learned in 300 or 600 updates.
    preference_row("SimPO, γ = 0, scale 4β", "simpo", from_pairs(lambda ref, r, prefer, beta, n: closed_form.simpo_law(n, r, 4 * beta)),
                   0.1, settings=lambda beta: {"scale": 4 * beta, "target_margin": 0.0}, average=True),
    preference_row("ORPO, λ = 0", "orpo", from_pairs(lambda ref, r, prefer, beta, n: closed_form.winners_law(ref, prefer, n)), 0.03,
                   settings=lambda beta: {"weight": 0.0}, average=True),
    # λ is so large that the law is nowhere negative. The law is then nearly that of the winners, so only "at rest" tests the hinge.
    preference_row("SLiC-HF, λ = 60, δ = 100", "slic", from_pairs(lambda ref, r, prefer, *_: closed_form.slic_law(ref, prefer, 60.0)),
                   0.01, settings=lambda beta: {"delta": 100.0, "weight": 60.0}),
    preference_row("GPO, truncated quadratic", "gpo", None, 0.25, settings=lambda beta: {"beta": beta, "f": "truncated_quadratic"}),
    preference_row("GPO, hinge", "gpo", None, 0.25, settings=lambda beta: {"beta": beta, "f": "hinge"}),
    preference_row("ORPO, λ = ¼", "orpo", None, 0.25, settings=lambda beta: {"weight": 0.25}, average=True),
    Row("KTO", "kto", None, expected_kto, kto_losses, 0.25),
]


def gradient_at(row, language, ref, law, beta):
    """Largest entry of the expected gradient over tabular logits at `law` (N, C): 0 if that is a fixed point of the method."""
    largest = []
    for n in range(len(language.prompts)):
        policy, p = TabularPolicy(language, law[n]), torch.tensor(law[n])
        loss = row.expected(policy.token_logps(), language.conditionals(ref[n]), language.rewards[n], p, language, beta)
        (grad,) = torch.autograd.grad(loss, policy.logits)
        largest.append(float(grad.abs().max()))
    return float(np.max(largest))  # (Python's max() would ignore a NaN)


def slope_left(row, language, policy, *, ref, beta):
    """gradient_at the policy divided by gradient_at ref: 1 if nothing was learned, 0 at rest."""
    return gradient_at(row, language, ref, language.law_of(policy).numpy(), beta) / gradient_at(row, language, ref, ref, beta)


def train(row, policy, language, cfg, seed, measure, every=50):
    """Train the policy in place with Adam, lr falling linearly to 0. Returns [(updates, measure(policy))] along the way."""
    ref = copy.deepcopy(policy).requires_grad_(False)
    torch.manual_seed(seed)
    value_model = policy.with_scalar_head()
    lengths = {"ppo": cfg.steps // 3 * 4, "rebel": cfg.steps // 20 * 20, "rft": 2 * cfg.steps, "irl": 2 * cfg.steps}
    updates = lengths.get(row.method, cfg.steps)
    optimizer = torch.optim.Adam([*policy.parameters(), *value_model.parameters()], lr=cfg.lr, betas=(0.9, 0.99))
    path = [(0, measure(policy))]
    for k, loss in enumerate(row.losses(policy, value_model, ref, language, cfg, seed)):
        optimizer.param_groups[0]["lr"] = cfg.lr * (1 - k / updates)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (k + 1) % every == 0 or k + 1 == updates:
            path.append((k + 1, measure(policy)))
    return path


def kl_to(language, policy, law, forward=False):
    """KL(π‖law), or KL(law‖π) with forward, averaged over prompts."""
    pairs = zip(language.law_of(policy).numpy(), law, strict=True)
    return statistics.mean(closed_form.kl(q, p) if forward else closed_form.kl(p, q) for p, q in pairs)


# ------------------------------------------------------------------------------------------------------------------- figure


def draw_figure(results, cfg):
    """One panel per row: log-probabilities of all completions, learned against the law (π* if there is none), one colour per prompt, and
    in grey those before training (ref). The last panel shows KL(π‖law) over the updates."""
    import matplotlib

    matplotlib.use("Agg")  # set here, not at import: a notebook that imports this file keeps its own backend
    import matplotlib.pyplot as plt

    columns = 6
    lines = -(-(len(results) + 1) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.4 * columns, 3.1 * lines), squeeze=False, constrained_layout=True)
    for axis in axes.flat[len(results) + 1 :]:
        axis.axis("off")
    for axis, (row, ref, learned, law, _, own, other) in zip(axes.flat, results, strict=False):
        low = np.log(law[law > 0]).min()
        axis.plot(np.log(law[law > 0]), np.log(ref[law > 0]), ".", ms=1, color="0.85", zorder=-1)
        axis.plot([low, 0], [low, 0], color="0.7", lw=1, zorder=0)
        for n, color in zip(range(len(law)), ("C0", "C1", "C2"), strict=False):
            possible = law[n] > 0
            axis.plot(np.log(law[n][possible]), np.log(learned[n][possible]), ".", ms=2, alpha=0.5, color=color)
        axis.set(xlabel="log probability, closed form" if row.law else "log probability, π* (which is not its law)", ylabel="learned")
        title = f"KL to its law {own:.4f}" if row.law else f"no law; {own:.1%} of the slope left"
        axis.set_title(f"{row.name}\n{title}, to π* {other:.4f}", fontsize=9)
    axis = axes.flat[len(results)]
    for row, _, _, _, path, *_ in (result for result in results if result[0].law):
        axis.semilogy(*zip(*path, strict=True), lw=1.2, label=row.name)
    axis.set(xlabel="updates", ylabel="KL(π‖its law)")
    axis.set_title("On the way", fontsize=9)
    names = axis.legend(fontsize=6.5, ncols=2, loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False)
    names.set_in_layout(False)  # the legend lies over the empty panels
    figure.savefig(cfg.out, dpi=130)
    plt.close(figure)


def dots(ref, law, learned, n=15):
    """[(ref, law, learned)] of n completions per prompt. Their ranks in the law run from first to last, evenly spaced in log rank."""
    chosen = [np.argsort(-p)[np.geomspace(1, (p > 0).sum(), n).round().astype(int) - 1] for p in law]
    prompts = zip(zip(ref, law, learned, strict=True), chosen, strict=True)
    return [[float(f"{p[c]:.5g}") for p in laws] for laws, places in prompts for c in places]


def main(cfg):
    """Print the table, write figure and numbers. Returns True if every row passed in every run. Raises BadInput."""
    known = list(dict.fromkeys(row.method for row in ROWS))
    if unknown := [name for name in cfg.methods if name not in (*known, "all")]:
        raise BadInput(f"--methods {unknown[0]}: no such method; choose all or some of {', '.join(known)}")
    chosen = known if "all" in cfg.methods or cfg.full and not cfg.methods else cfg.methods or FEW
    if not (cfg.beta > 0 and cfg.lr > 0) or cfg.seeds < 1 or cfg.steps < 20 or cfg.samples < 4 or cfg.samples % 4:
        raise BadInput("--beta and --lr must be above 0, --seeds at least 1, --steps 20, --samples a multiple of 4 (RLOO's group size)")
    figure_path("--out", cfg.out)
    language = Language() if cfg.full else Language(n_content=4, max_new=3, n_prompts=2)
    cfg = replace(cfg, steps=2 * cfg.steps) if cfg.full else cfg
    started, results, judged = time.monotonic(), [], []
    for seed in range(cfg.seeds):
        policy = tiny_gpt(language.vocab_size, seed=seed, dtype=torch.float32, mixing=0.3)
        ref = language.law_of(policy).numpy()
        best = tilted(language, ref, cfg.beta)
        rewards = language.rewards.numpy()
        if not seed:
            print(f"{len(language.prompts)} prompts with {len(language.completions)} completions, β = {cfg.beta:g}: E[r] of ref "
                  f"{(ref * rewards).sum(1).mean():.3f}, of π* {(best * rewards).sum(1).mean():.3f}; "
                  f"KL(ref‖π*) {statistics.mean(map(closed_form.kl, ref, best)):.3f}")
            if "grpo" in chosen:
                thresholds = [closed_form.collapse_threshold(ref[n], r)[0] for n, r in enumerate(rewards)]
                shown = ", ".join(f"{threshold:.3f}" for threshold in thresholds)
                print(f"rewards over their std, less β·k1 after the division, would collapse for β below {shown} (one per prompt)")
            print(f"{'':6}{'':34}{'at rest':>9}{'KL to law':>11}{'gate':>8}{'KL to π*':>10}{'E[r]':>8}{'seconds':>9}")
        for row in ROWS:
            if row.method not in chosen:
                if row.law and not cfg.methods:
                    at_rest = gradient_at(row, language, ref, row.law(language, ref, cfg.beta), cfg.beta)
                    judged.append(at_rest < 1e-10)
                    print(f"{'PASS' if judged[-1] else 'FAIL'}  {row.name:34}{at_rest:9.0e}      (not trained)", flush=True)
                continue
            trained, begun = copy.deepcopy(policy), time.monotonic()
            if row.law:
                law = row.law(language, ref, cfg.beta)
                at_rest = gradient_at(row, language, ref, law, cfg.beta)
                path = train(row, trained, language, cfg, seed, partial(kl_to, language, law=law, forward=row.forward))
            else:  # without a law: is the policy at rest where it ended?
                law, at_rest = best, 0.0
                path = train(row, trained, language, cfg, seed, partial(slope_left, row, language, ref=ref, beta=cfg.beta), every=cfg.steps)
            learned, seconds = language.law_of(trained).numpy(), time.monotonic() - begun
            own, other = path[-1][1], kl_to(language, trained, best)
            off = abs(((learned - law) * rewards).sum(1).mean())
            passed = at_rest < 1e-10 and own <= row.gate and off <= row.reward_gate and (not row.elsewhere or other >= 2 * own)
            judged.append(passed)  # (a NaN fails)
            shown = f"{at_rest:9.0e}" if row.law else "    slope"
            print(f"{'PASS' if passed else 'FAIL'}  {row.name:34}{shown}{own:11.4f}{row.gate:8.3f}{other:10.4f}"
                  f"{(learned * rewards).sum(1).mean():8.3f}{seconds:9.1f}", flush=True)
            if not seed:
                results.append((row, ref, learned, law, path, own, other))
    draw_figure(results, cfg)
    numbers = Path(cfg.out).with_suffix(".json")
    write_atomic(numbers, json.dumps({"commit": commit(), "beta": cfg.beta, "laws": {
        row.name: {"method": row.method, "dots": dots(ref, law, learned)} for row, ref, learned, law, *_ in results if row.law
    }}, ensure_ascii=False) + "\n")
    print(f"{sum(judged)} of {len(judged)} rows on their law in {time.monotonic() - started:.0f} s; figure: {cfg.out}, numbers: {numbers}")
    return all(judged)


if __name__ == "__main__":
    with exit_codes("tiny_language"):
        sys.exit(0 if main(cli(Config, sys.argv[1:], prog="python -m toy.tiny_language", description=__doc__)) else 1)
