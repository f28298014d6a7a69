"""A second account of a run in which reward and policy take turns (rft, irl): one completion at a time, unpadded, in plain loops.

What main() does with the pieces, written out again from the equations: whose answers are drawn by which seed, what is paid, what a round
begins with, which learning rate a step has. Only the models, the sampler and AdamW are the project's (or torch's) own.
"""

import copy

import torch

from minialign.data import encode_demos, read_demonstrations
from minialign.engine.common import batch_rows, derive_seed, read_rows
from minialign.methods import ppo
from minialign.sample import sample
from minialign.tokenizer import load_tokenizer
from minialign.weights import load_pretrained


def clipped(A, ratio, eps=0.2):
    """min(ρA, clip(ρ)A), flat where the clip acts."""
    flat = max(min(float(ratio.detach()), 1 + eps), 1 - eps)
    return flat * A + 0 * ratio if flat * A < float(ratio.detach()) * A else ratio * A


def softplus(z):
    return (1 + z.exp()).log()


class Account:
    """kinds: what each step is, R or p, a blank before each round but the first: "RRppp RRppp". Make it before the run: it watches for the
    critic that PPO starts from, the only thing that is random at the start."""

    def __init__(self, method, cfg, kinds, monkeypatch):
        self.method, self.cfg, self.critic = method, cfg, None
        self.steps = [(t, j == 0, kind) for t, turn in enumerate(kinds.split()) for j, kind in enumerate(turn)]
        original = ppo.rollout_with_values

        def rollout(policy, value_model, *args):
            self.critic = self.critic or copy.deepcopy(value_model)
            return original(policy, value_model, *args)

        monkeypatch.setattr(ppo, "rollout_with_values", rollout)

    def replay(self):
        cfg = self.cfg
        self.policy, self.tokenizer = load_pretrained(cfg.policy), load_tokenizer(cfg.policy)
        self.anchor = copy.deepcopy(self.policy)
        self.reward = self.policy.with_scalar_head()
        with torch.no_grad():
            self.reward.head_weight.zero_()
        self.start, self.base = copy.deepcopy(self.reward), copy.deepcopy(self.reward)
        self.rows = encode_demos(self.tokenizer, read_demonstrations(cfg.demos))
        self.optimizer = self.adam(self.policy, *([self.critic] if self.critic else []))
        self.reward_optimizer = self.adam(self.reward)
        self.metrics, done = [], {"R": 0, "p": 0}
        for k, (t, begins, kind) in enumerate(self.steps):
            if begins and self.method == "irl":
                self.begin_round()
            share = done[kind] / sum(other == kind for *_, other in self.steps)
            self.place = done[kind], (cfg.seed, kind == "R")  # each kind of step goes through the file on its own
            done[kind] += 1
            lr = (cfg.reward_lr if kind == "R" else cfg.lr) * (1 - share)  # schedule linear, no warm-up
            row = {"round": t, "lr": lr}
            self.metrics.append(row | (self.reward_step if kind == "R" else self.policy_step)(k, lr))

    def begin_round(self):
        cfg = self.cfg
        if cfg.mode == "literal":  # Algorithm 1 as printed: from nothing
            self.reward.load_state_dict(self.start.state_dict())
        else:
            self.base = copy.deepcopy(self.reward)
        if cfg.mode != "linear":
            self.reward_optimizer = self.adam(self.reward)
        if cfg.anchor == "current":
            self.anchor = copy.deepcopy(self.policy)

    # ---------------------------------------------------------------------------------------------------------------- pieces

    @staticmethod
    def adam(*models):
        return torch.optim.AdamW([p for model in models for p in model.parameters()], betas=(0.9, 0.95), weight_decay=0.0)

    def follow(self, optimizer, loss, lr, *models):
        """One step of AdamW, the gradient of each model no longer than max_grad_norm."""
        optimizer.zero_grad()
        loss.backward()
        for model in models:
            norm = sum(float((p.grad**2).sum()) for p in model.parameters()) ** 0.5
            for p in model.parameters():
                p.grad *= min(1.0, self.cfg.max_grad_norm / (norm + 1e-6))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()

    def worth(self, model, prompt, completion):
        """r(x, y): a number for every token of the completion, added, or the last of them; within [0, R]."""
        numbers = model.hidden(torch.tensor([prompt + completion]))[0] @ model.head_weight[0]
        number = numbers[len(prompt) :].sum() if self.cfg.read == "sum" else numbers[-1]
        return self.cfg.bound / (1 + (-number).exp()) if self.cfg.bound else number

    def log_probs(self, policy, prompt, completion, tau):
        logits = policy(torch.tensor([prompt + completion]))[0, len(prompt) - 1 : -1] / tau
        return torch.stack([logits[t].log_softmax(0)[token] for t, token in enumerate(completion)])

    def draw(self, k, count, n):
        """[(row, completion)]: n answers of the policy to each of `count` prompts of step k."""
        picked = batch_rows(len(self.rows), count, *self.place)
        answers = sample(self.policy, [self.rows[i][0] for i in picked], max_new=self.cfg.max_new, tau=self.cfg.tau, n=n,
                         eos_id=self.tokenizer.eos_id, seed=derive_seed(self.method, self.cfg.seed, k))
        return [(picked[b // n], y) for b, y in enumerate(answers.completions)]

    # ----------------------------------------------------------------------------------------------------------------- steps

    def reward_step(self, k, lr):
        cfg, losses, margins = self.cfg, [], []
        mode = getattr(cfg, "mode", "linear")
        for i, own in self.draw(k, cfg.batch_size, 1):
            prompt, demo = self.rows[i]
            d, s = (self.worth(self.reward, prompt, y) for y in (demo, own))
            if mode != "linear":
                with torch.no_grad():
                    d0, s0 = (self.worth(self.base if mode == "accumulate" else self.start, prompt, y) for y in (demo, own))
                d, s = d - d0, s - s0
            bt = mode != "linear" or getattr(cfg, "loss", "linear") == "bt"
            losses.append((softplus(s - d) if bt else (s - d) / cfg.beta) + cfg.ridge * (d**2 + s**2))
            margins.append((d - s).item())
        loss = sum(losses) / cfg.batch_size
        self.follow(self.reward_optimizer, loss, lr, self.reward)
        return {"loss": loss.item(), "rewards/margins": sum(margins) / len(margins)}

    def policy_step(self, k, lr):
        cfg = self.cfg
        n = {"rloo": cfg.group_size, "ppo": 1}.get(cfg.policy_step) or cfg.n
        rows = []
        for i, y in self.draw(k, cfg.batch_size // n, n):
            x = self.rows[i][0]
            with torch.no_grad():
                paid = float(self.worth(self.reward, x, y))
                if getattr(cfg, "anchor", "initial") == "current":
                    paid -= float(self.worth(self.base, x, y))
                old, ref = (self.log_probs(model, x, y, cfg.tau) for model in (self.policy, self.anchor))
            rows.append((x, y, paid, old, ref))
        losses = {"rloo": self.rloo, "ppo": self.ppo}.get(cfg.policy_step, self.selection)(rows, n, lr)
        row = {"loss": sum(losses) / len(losses), "reward": sum(paid for *_, paid, _, _ in rows) / len(rows)}
        if cfg.policy_step in ("rloo", "ppo"):
            row["kl"] = sum(float((old - ref).sum()) for *_, old, ref in rows) / len(rows)
        return row

    def rloo(self, rows, n, lr):
        cfg = self.cfg
        R = [paid - cfg.beta * float((old - ref).sum()) for *_, paid, old, ref in rows]
        loss = 0.0
        for b, (x, y, _, old, _) in enumerate(rows):
            others = [R[j] for j in range(len(rows)) if j // n == b // n and j != b]
            loss -= (R[b] - sum(others) / len(others)) * (self.log_probs(self.policy, x, y, cfg.tau) - old).sum().exp() / len(rows)
        self.follow(self.optimizer, loss, lr, self.policy)
        return [loss.item()]

    def ppo(self, rows, n, lr):
        """γ = 1, λ = .95, four updates, both clips at .2, advantages whitened: ppo.py's own defaults."""
        cfg, A, G, before, lam, losses = self.cfg, [], [], [], 0.95, []

        def values_of(x, y):
            return (self.critic.hidden(torch.tensor([(x + y)[:-1]]))[0] @ self.critic.head_weight[0])[len(x) - 1 :]

        for x, y, paid, old, ref in rows:
            with torch.no_grad():
                V = [*values_of(x, y).tolist(), 0.0]
            r = [-cfg.beta * float(old[t] - ref[t]) + (paid if t == len(y) - 1 else 0.0) for t in range(len(y))]
            delta = [r[t] + V[t + 1] - V[t] for t in range(len(y))]
            A.append([sum(lam ** (s - t) * delta[s] for s in range(t, len(y))) for t in range(len(y))])
            G.append([a + v for a, v in zip(A[-1], V, strict=False)])
            before.append(V)
        flat = torch.tensor(sum(A, []), dtype=torch.float64)
        A = [[(a - float(flat.mean())) / float((flat.var(correction=0) + 1e-8).sqrt()) for a in row] for row in A]
        for _ in range(4):
            loss = 0.0
            for (x, y, _, old, _), a, g, v_old in zip(rows, A, G, before, strict=True):
                new, v = self.log_probs(self.policy, x, y, cfg.tau), values_of(x, y)
                for t in range(len(y)):
                    near = v_old[t] + (v[t] - v_old[t]).clamp(-0.2, 0.2)
                    errors = (v[t] - g[t]) ** 2, (near - g[t]) ** 2
                    worse = errors[0] if float(errors[0].detach()) >= float(errors[1].detach()) else errors[1]
                    loss = loss - clipped(a[t], (new[t] - old[t]).exp()) + 0.5 * worse
            loss = loss / len(flat)
            self.follow(self.optimizer, loss, lr, self.policy, self.critic)
            losses.append(loss.item())
        return losses

    def selection(self, rows, n, lr):
        """The best of each n imitated, or preferred to the worst; of equals the first drawn."""
        cfg, loss, groups = self.cfg, 0.0, [rows[b : b + n] for b in range(0, len(rows), n)]
        for group in groups:
            best, worst = max(group, key=lambda row: row[2]), min(group, key=lambda row: row[2])
            logps = [self.log_probs(self.policy, x, y, 1.0).sum() for x, y, *_ in (best, worst)]
            with torch.no_grad():
                ref = [self.log_probs(self.anchor, x, y, 1.0).sum() for x, y, *_ in (best, worst)]
            bon_dpo = softplus(-cfg.beta * ((logps[0] - ref[0]) - (logps[1] - ref[1])))
            loss += (bon_dpo if cfg.policy_step == "bon_dpo" else -logps[0]) / len(groups)
        self.follow(self.optimizer, loss, lr, self.policy)
        return [loss.item()]

    # ----------------------------------------------------------------------------------------------------------- comparison

    def error(self, folder):
        """Largest difference to the exported policy and reward; and that both have moved."""
        worst = 0.0
        for own, first, path in ((self.policy, load_pretrained(self.cfg.policy), "final"), (self.reward, self.start, "reward")):
            own, first = dict(own.named_parameters()), dict(first.named_parameters())
            exported = dict(load_pretrained(folder / path).named_parameters())
            assert own.keys() == exported.keys() == first.keys()
            assert max(float((own[name] - first[name]).detach().abs().max()) for name in own) > 1e-4, path
            worst = max(worst, *(float((own[name] - exported[name]).detach().abs().max()) for name in own))
        return worst

    def compare_metrics(self, folder):
        logged = read_rows(folder / "metrics.jsonl")
        assert len(logged) == len(self.metrics)
        for own, row in zip(self.metrics, logged, strict=True):
            for name, value in own.items():
                assert abs(row[name] - value) < 1e-9, (row["step"], name, row[name], value)
