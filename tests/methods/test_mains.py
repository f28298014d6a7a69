"""What main() does with the pieces, against the same three steps written out again: one completion at a time, unpadded, in plain loops.

The pieces are tested elsewhere; here it is the wiring. Every step after the first has a KL, so a sign, an argument in the wrong place, a
baseline used late, advantages made after whitening instead of before, or old log-probs of the wrong policy change the weights.
"""

import copy

import pytest
import torch

from minialign.data import encode_prompt, read_prompts
from minialign.engine.common import batch_rows, derive_seed
from minialign.sample import sample
from minialign.tokenizer import load_tokenizer
from minialign.weights import load_pretrained

STEPS, B, MAX_NEW, LR, BETA, TAU = 3, 8, 12, 3e-3, 0.3, 0.8
# Rewards are multiples of 1/8: exact in the float32 in which they are asked for.
SHARED = dict(steps=STEPS, batch_size=B, max_new=MAX_NEW, lr=LR, beta=BETA, tau=TAU, held_out=0.0, reward=["length:8"], missing_eos=0.5,
              schedule="constant", warmup=0.0, micro_batch=3)


def log_probs(policy, prompt, completion):
    """log π of each token of one completion, alone in its batch, at the temperature TAU: (tokens,)."""
    row = torch.tensor([prompt + completion])
    logits = policy(row[:, :-1])[0, len(prompt) - 1 :] / TAU
    return torch.stack([logits[t].log_softmax(0)[token] for t, token in enumerate(completion)])


def clipped(A, ratio, eps=0.2):
    flat = max(min(ratio.detach(), 1 + eps), 1 - eps)
    return flat * A + 0 * ratio if flat * A < float(ratio.detach()) * A else ratio * A


class Replay:
    """The policy, its reference and AdamW, and the rollouts that the seeds give."""

    def __init__(self, method, cfg, n):
        self.method, self.cfg, self.n = method, cfg, n
        self.policy = load_pretrained(cfg.policy)
        self.ref, self.tokenizer = copy.deepcopy(self.policy), load_tokenizer(cfg.policy)
        self.prompts = [encode_prompt(self.tokenizer, prompt) for prompt in read_prompts(cfg.prompts)]
        self.optimizers = [torch.optim.AdamW(self.policy.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)]

    def rollout(self, k):
        """[(prompt, completion, score, old log-probs, ref log-probs)] of step k."""
        picked = batch_rows(len(self.prompts), B // self.n, k, 0)
        prompts = [self.prompts[i] for i in picked]
        answers = sample(self.policy, prompts, max_new=MAX_NEW, tau=TAU, n=self.n, eos_id=self.tokenizer.eos_id,
                         seed=derive_seed(self.method, 0, k))
        rows = []
        for b, completion in enumerate(answers.completions):
            prompt = prompts[b // self.n]
            length = len(self.tokenizer.decode(completion))
            score = max(-1.0, -abs(length - 8) / 8) - (0.0 if completion[-1] == self.tokenizer.eos_id else 0.5)
            with torch.no_grad():
                old, ref = (log_probs(model, prompt, completion) for model in (self.policy, self.ref))
            rows.append((prompt, completion, score, old, ref))
        return rows

    def update(self, loss):
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self.optimizers:
            parameters = optimizer.param_groups[0]["params"]
            norm = sum(float((p.grad**2).sum()) for p in parameters) ** 0.5
            for p in parameters:
                p.grad *= min(1.0, 1.0 / (norm + 1e-6))
            optimizer.step()

    def error(self, folder):
        """Largest difference to the weights that the run exported; and that they have moved at all."""
        own, first = dict(self.policy.named_parameters()), dict(load_pretrained(self.cfg.policy).named_parameters())
        exported = dict(load_pretrained(folder / "final").named_parameters())
        assert max(float((own[name] - first[name]).detach().abs().max()) for name in own) > 1e-3
        return max(float((own[name] - exported[name]).detach().abs().max()) for name in own)


def penalised(row):
    """r − β·Σ_t (log π_old − log ref)."""
    _, _, score, old, ref = row
    return score - BETA * float((old - ref).sum())


def test_reinforce(small):
    module, cfg = small("reinforce", decay=0.8, **SHARED)
    folder, replay = module.main(cfg), Replay("reinforce", cfg, 1)
    total = weight = 0.0
    for k in range(STEPS):
        rows = replay.rollout(k)
        rewards = [penalised(row) for row in rows]
        baseline = total / weight if weight else 0.0
        replay.update(-sum((R - baseline) * log_probs(replay.policy, x, y).sum() for R, (x, y, *_) in zip(rewards, rows, strict=True)) / B)
        total, weight = 0.8 * total + 0.2 * sum(rewards) / B, 0.8 * weight + 0.2
    assert replay.error(folder) < 1e-9


def test_rloo(small):
    module, cfg = small("rloo", group_size=4, epochs=3, **SHARED)
    folder, replay = module.main(cfg), Replay("rloo", cfg, 4)
    for k in range(STEPS):
        rows = replay.rollout(k)
        R = [penalised(row) for row in rows]
        A = [R[b] - sum(R[j] for j in range(b - b % 4, b - b % 4 + 4) if j != b) / 3 for b in range(B)]
        for _ in range(3):
            ratios = [(log_probs(replay.policy, x, y) - old).sum().exp() for x, y, _, old, _ in rows]
            replay.update(-sum(clipped(a, ratio) for a, ratio in zip(A, ratios, strict=True)) / B)
    assert replay.error(folder) < 1e-9


@pytest.mark.parametrize(("aggregate", "rounds"), [("grpo", 1), ("dapo", 1), ("dr_grpo", 1), ("grpo", 2)])
def test_grpo(small, aggregate, rounds):
    module, cfg = small("grpo", group_size=4, epochs=2, aggregate=aggregate, rounds=rounds, **SHARED)
    folder, replay = module.main(cfg), Replay("grpo", cfg, 4)
    for k in range(STEPS):
        if rounds == 2 and k == -(-STEPS // 2):
            replay.ref = copy.deepcopy(replay.policy)
        rows = replay.rollout(k)
        A = []
        for g in range(0, B, 4):
            group = torch.tensor([row[2] for row in rows[g : g + 4]], dtype=torch.float64)
            A += ((group - group.mean()) / (group.std() + 1e-4)).tolist() if group.std() > 0 else [0.0] * 4
        for _ in range(2):
            losses = []
            for a, (x, y, _, old, ref) in zip(A, rows, strict=True):
                new = log_probs(replay.policy, x, y)
                k3 = (ref - new).exp() - 1 - (ref - new)
                losses.append([BETA * k3[t] - clipped(a, (new[t] - old[t]).exp()) for t in range(len(y))])
            tokens = sum(len(row) for row in losses)
            replay.update({"grpo": sum(sum(row) / len(row) for row in losses) / B, "dapo": sum(map(sum, losses)) / tokens,
                           "dr_grpo": sum(map(sum, losses)) / (B * MAX_NEW)}[aggregate])
    assert replay.error(folder) < 1e-9


def test_rebel(small):
    module, cfg = small("rebel", eta=0.7, epochs=2, **SHARED)
    folder, replay = module.main(cfg), Replay("rebel", cfg, 2)
    for k in range(STEPS):
        rows = replay.rollout(k)
        R = [penalised(row) for row in rows]
        for _ in range(2):
            moved = [(log_probs(replay.policy, x, y) - old).sum() for x, y, _, old, _ in rows]
            replay.update(sum(((moved[b] - moved[b + 1]) / 0.7 - (R[b] - R[b + 1])) ** 2 for b in range(0, B, 2)) / (B // 2))
    assert replay.error(folder) < 1e-9


@pytest.mark.parametrize("whiten", [True, False])
def test_ppo(small, whiten):
    """The critic starts at a reward model's folder, so that nothing random has to be repeated."""
    critic, rm_cfg = small("reward_model", steps=1)
    value = critic.main(rm_cfg) / "final"
    module, cfg = small("ppo", epochs=2, gamma=0.95, lam=0.9, whiten=whiten, value=str(value), value_lr=2e-3, **SHARED)
    folder, replay = module.main(cfg), Replay("ppo", cfg, 1)
    value_model = load_pretrained(value)
    replay.optimizers.append(torch.optim.AdamW(value_model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0))

    def values_of(x, y):
        return value_model(torch.tensor([(x + y)[:-1]]))[0, len(x) - 1 :]

    for k in range(STEPS):
        rows, A, G, V_old = replay.rollout(k), [], [], []
        for x, y, score, old, ref in rows:
            with torch.no_grad():
                V = [*values_of(x, y).tolist(), 0.0]
            r = [-BETA * float(old[t] - ref[t]) + (score if t == len(y) - 1 else 0.0) for t in range(len(y))]
            delta = [r[t] + 0.95 * V[t + 1] - V[t] for t in range(len(y))]
            A.append([sum((0.95 * 0.9) ** (s - t) * delta[s] for s in range(t, len(y))) for t in range(len(y))])
            G.append([a + v for a, v in zip(A[-1], V, strict=False)])
            V_old.append(V)
        flat = torch.tensor(sum(A, []), dtype=torch.float64)
        scale = float((flat.var(correction=0) + 1e-8).sqrt())
        if whiten:
            A = [[(a - float(flat.mean())) / scale for a in row] for row in A]
        for _ in range(2):
            policy_loss = critic_loss = 0.0
            for (x, y, _, old, _), a, g, v_old in zip(rows, A, G, V_old, strict=True):
                new, v = log_probs(replay.policy, x, y), values_of(x, y)
                for t in range(len(y)):
                    policy_loss -= clipped(a[t], (new[t] - old[t]).exp())
                    near = v_old[t] + max(min(v[t] - v_old[t], torch.tensor(0.2)), torch.tensor(-0.2))
                    critic_loss += 0.5 * max((v[t] - g[t]) ** 2, (near - g[t]) ** 2, key=float)
            replay.update((policy_loss + critic_loss) / len(flat))
    assert replay.error(folder) < 1e-9
