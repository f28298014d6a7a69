"""Compare checkpoints on held-out preference pairs and by their sampled answers.

On the pairs (x is the prompt, y_w the chosen and y_l the rejected answer):

    NLL         −Σ log π(y_w|x) / tokens                        what SFT minimises, on the chosen answers
    gap         mean of log π(y_w|x) − log π(y_l|x)             does the policy itself prefer the chosen answer? (sums over tokens)
    implicit    share of pairs with log π/ref (y_w) > log π/ref (y_l): accuracy of the implicit reward log π/ref
    reward acc. share of pairs with r(y_w) > r(y_l), for each --reward

On n sampled answers of each policy to each prompt of the pairs:

    reward      mean of the first --reward
    win rate    share of comparisons with the opponent's answer to the same prompt in which the policy's answer has the higher reward
    KL          mean of log π(y|x)/ref(y|x) over the policy's answers, nats: an unbiased estimate of KL(π‖ref)
    needed      KL between the rewards' distributions under π and ref: the least KL at which a policy can have these rewards
    wasted      KL − needed: what training changed besides, 0 at the optimum of r − β·KL for every β (derivation: needed_kl)
    distinct    number of different texts / number of answers: 1 if no answer occurs twice, 1/answers if all are the same

The tables give n and 95 % intervals: normal for means, Wilson for shares, the ratio estimator for the NLL. Ties count one half. The n
answers to one prompt are averaged first, so intervals count prompts. The gap of sums favours the shorter answer, so the gap per token
is given too. --figure plots reward over √KL: how far from ref each policy moved to get it.

    python -m minialign evaluate --policies runs/base/final runs/sft/final --ref runs/base/final --pairs pairs.jsonl --reward runs/rm/final
"""

import json
import math
import statistics
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from minialign.data import encode_pairs, encode_prompts, pair_batch, plain_text, read_preferences, split_held_out
from minialign.engine import parallel
from minialign.engine.common import BadInput, Mean, figure_path, floats, held_out_passes, in_micro, pick_device, pick_dtype, write_atomic
from minialign.kl import k1
from minialign.logps import token_logps
from minialign.lora import load_model
from minialign.rewards import BadReward, ask, learned, open_reward, reward_folders, score
from minialign.sample import comparable_logps, most_rows, sample
from minialign.settings import check_config
from minialign.task import builtin_pairs


@dataclass
class Config:
    policies: list[str] = field(default_factory=list)  # folders or hub names to compare
    ref: str = ""                   # the reference of the implicit reward and of the KL; default: the first policy
    against: str = ""               # the opponent of the win rate; default: the reference
    reward: list[str] = field(default_factory=list)  # builtin, FILE.py:FUNCTION, a reward model, …: docs/DATA.md; the first scores answers
    reward_limit: float = 60.0      # seconds that a reward may take for batch_size answers
    pairs: str = "builtin"          # preferences: builtin, or a JSONL/JSON(.gz) file
    held_out: float = 0.1           # share of the file to use, from its end; runs with the same --held_out never train on it; 1 = all
    batch_size: int = 32            # pairs per forward pass; report it with published numbers
    max_len: int = 256              # longest row in tokens; a longer one loses its end
    max_prompt: int | None = None   # longest prompt in tokens; a longer one loses its beginning
    n: int = 1                      # answers of each policy to each prompt; 0 = none are sampled
    max_new: int = 64               # longest answer in tokens
    tau: float = 1.0                # temperature of sampling and of the KL
    show: int = 2                   # prompts whose answers are printed side by side
    seed: int = 0                   # seed of the sampled answers
    device: str = "auto"            # auto, cpu, cuda, mps
    dtype: str = "float32"          # float32, bfloat16 or float64
    out: str = ""                   # also write the table as JSON to this file
    figure: str = ""                # also draw reward over √KL to this PNG
    skip_bad: bool = False          # count and skip bad rows of a file instead of stopping at the first


# ---------------------------------------------------------------------------------------------------------------- intervals


def mean_interval(values):
    """(mean, half-width of the normal 95 % interval) of an (n,) tensor. The half-width is NaN for n < 2."""
    values = values.double()
    half = 1.96 * float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), half


def ratio_interval(sums, sizes):
    """(Σ sums / Σ sizes, half-width of its 95 % interval) by the ratio estimator: nats per token over rows of unequal length."""
    sums, sizes = sums.double(), sizes.double()
    ratio = float(sums.sum() / sizes.sum())
    n = len(sums)
    spread = math.sqrt(n / (n - 1) * float(((sums - ratio * sizes) ** 2).sum())) / float(sizes.sum()) if n > 1 else math.nan
    return ratio, 1.96 * spread


def share_interval(successes, n):
    """(share, low, high): Wilson's 95 % interval, which stays inside [0, 1] and works for small n."""
    z, p = 1.96, successes / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return p, centre - half, centre + half


FEWEST = 5  # ref's answers in a class of rewards; classes with fewer are joined with a neighbour
MOST_CLASSES = 12  # more different rewards than this are put into classes by ref's quantiles


def reward_classes(rewards, ref_rewards):
    """Counts of the policy's and of ref's rewards in the same classes, two (K,) tensors, from two tensors of any size.

    A class is a value of the reward, or with many values a range between two quantiles of ref's. Joining classes can only lower the KL
    between the two, so `needed` stays a lower bound.
    """
    ref = ref_rewards.double().flatten()
    values = torch.cat([rewards.double().flatten(), ref]).unique()
    if len(values) > MOST_CLASSES:
        values = ref.quantile(torch.arange(1, MOST_CLASSES, dtype=torch.float64) / MOST_CLASSES).unique()  # the ends of ranges
    else:
        values = (values[:-1] + values[1:]) / 2
    counts = [torch.bucketize(x.double().flatten(), values).bincount(minlength=len(values) + 1) for x in (rewards, ref)]
    joined, waiting = [], [0, 0]
    for own, others in zip(*[count.tolist() for count in counts], strict=True):
        waiting = [waiting[0] + own, waiting[1] + others]
        if waiting[1] >= FEWEST:
            joined, waiting = [*joined, waiting], [0, 0]
    if any(waiting) and joined:
        joined[-1] = [a + b for a, b in zip(joined[-1], waiting, strict=True)]
    return torch.tensor(joined or [waiting], dtype=torch.float64).unbind(1)


def needed_kl(counts, ref_counts):
    """(needed, half-width of its 95 % interval) in nats, from the (K,) counts of reward_classes.

    By the chain rule KL(π‖ref) = KL(P_π(r)‖P_ref(r)) + E_{r~π} KL(π(y|r)‖ref(y|r)). The first term depends on the distribution of the
    rewards alone (needed), the second is never negative (wasted). It is 0 if and only if π(y|r) = ref(y|r), that is π ∝ ref·f(r): so it is
    at the optimum of E[r] − β·KL for every β, at best-of-n, and at ref restricted to good answers. Over several prompts the distributions
    are those of all prompts together, so needed is at most what it is prompt by prompt.

    From N and M answers, drawn independently, the estimate Σ p̂ log(p̂/q̂) is too high by (K − 1)/2N + (Σ p/q − 1)/2M to second order, which
    is subtracted. Its variance is Var_p(log p/q)/N + (Σ p²/q − 1)/M, and near p = q, where both vanish, that of ½(1/N + 1/M)·χ² with K − 1
    degrees of freedom.
    """
    N, M, K = float(counts.sum()), float(ref_counts.sum()), len(counts)
    p, q = counts / N, ref_counts / M
    logratio = torch.where(p > 0, (p.clamp(min=1e-300) / q).log(), 0)
    plain = float((p * logratio).sum())
    bias = ((p > 0).sum().item() - 1) / (2 * N) + (float((p / q).sum()) - 1) / (2 * M)
    variance = float((p * (logratio - plain) ** 2).sum()) / N + (float((p**2 / q).sum()) - 1) / M + (K - 1) / 2 * (1 / N + 1 / M) ** 2
    return plain - bias, 1.96 * math.sqrt(max(0.0, variance))


T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # Student's t, n − 1 degrees of freedom, 97.5 %


def verdict(differences):
    """(mean, half-width of the 95 % interval, seeds in favour, verdict) of paired differences, one per seed."""
    n, mean, favour = len(differences), statistics.mean(differences), sum(d > 0 for d in differences)
    if n < 2:
        return mean, math.nan, favour, "not separable"
    half = T95.get(n, 2.23) * statistics.stdev(differences) / math.sqrt(n)
    return mean, half, favour, "holds" if mean - half > 0 else "does not hold" if mean + half < 0 else "not separable"


def wins(left, right):
    """How many numbers of left exceed those of right, as a float. A tie counts one half."""
    return float((left > right).sum()) + 0.5 * float((left == right).sum())


# ------------------------------------------------------------------------------------------------------------------ measures


@torch.no_grad()
def held_out_nll(policy, rows, batch_of, cfg):
    """{'eval/nll': nats per scored token}; {} without rows. rows: from encode_demos; batch_of(rows, picked) -> Batch."""
    sums = []  # of each pass: nats, tokens
    for picked, weight in held_out_passes(rows, cfg):
        batch = batch_of(rows, picked)
        sums += [-weight * token_logps(policy, batch).sum(), weight * batch.mask.sum()]
    numbers = floats(sums)
    nats, tokens = parallel.sum_over_processes(sum(numbers[::2])), parallel.sum_over_processes(sum(numbers[1::2]))
    return {"eval/nll": nats / tokens if tokens else math.nan} if rows else {}


def held_out_reward(policy, tokenizer, rows, reward_fn, cfg):
    """{'eval/reward': mean reward of one completion for each of the first batch_size held-out prompts}; {} without prompts.

    rows: [(prompt ids, prompt)] from encode_prompts. If the reward fails, this prints why and returns {}: training does not depend on it.
    """
    if not rows:
        return {}
    prompts_ids, prompts = zip(*rows[: cfg.batch_size], strict=True)
    answers = sample(policy, prompts_ids, max_new=cfg.max_new, tau=cfg.tau, eos_id=tokenizer.eos_id, seed=("eval", cfg.seed))
    try:
        rewards = ask(reward_fn, prompts, [tokenizer.decode(ids) for ids in answers.completions], limit=cfg.reward_limit)
    except BadReward as error:
        print(f"no eval/reward: {error}", file=sys.stderr)
        return {}
    return {"eval/reward": rewards.mean()}


@torch.no_grad()
def held_out_pairs(step, rows, batch_of, cfg):
    """{'eval/loss', 'eval/accuracy'} over all rows; {} without rows. rows: from encode_pairs; step(pairs) -> (loss, stats)."""
    mean = Mean()
    for picked, weight in held_out_passes(rows, cfg):
        loss, stats = step(batch_of(rows, picked))
        mean.add({"eval/loss": loss, "eval/accuracy": stats["rewards/accuracies"]}, weight=weight * len(picked))
    return mean.result()


@torch.no_grad()
def pair_measures(model, tokenizer, pairs, cfg):
    """{'chosen', 'rejected': summed log-probs, or rewards for a scalar head; 'chosen_tokens', 'rejected_tokens': counts; 'readable':
    whether template and tokenizer take the pair (if not, and without --skip_bad, BadInput); 'scorable': whether the prompt leaves room
    for an answer; where one of these is false, the others are 0}, (n,) tensors."""
    read = [*pairs]  # loses the pairs that cannot be read
    rows = encode_pairs(tokenizer, read, max_prompt=cfg.max_prompt, skip_bad=cfg.skip_bad, whole=model.config.reward_read == "conversation")
    known = dict(zip(map(id, read), rows, strict=True))
    rows = [known.get(id(pair)) for pair in pairs]
    readable = torch.tensor([row is not None for row in rows])
    scorable = torch.tensor([row is not None and len(row[0]) < cfg.max_len for row in rows])
    fits = scorable.nonzero().flatten().tolist()
    columns = {name: torch.zeros(len(rows), dtype=torch.float64) for name in ("chosen", "rejected", "chosen_tokens", "rejected_tokens")}
    for start in range(0, len(fits), cfg.batch_size):
        picked = fits[start : start + cfg.batch_size]
        batch = pair_batch(rows, picked, pad_id=tokenizer.pad_id, max_len=cfg.max_len).to(model.head_weight.device)
        for side, half in (("chosen", batch.chosen), ("rejected", batch.rejected)):
            values = score(model, half) if model.config.head == "scalar" else token_logps(model, half).sum(1)
            columns[side][picked] = values.cpu().double()
            columns[f"{side}_tokens"][picked] = half.mask.sum(1).cpu().double()
    return {**columns, "readable": readable, "scorable": scorable}


def common_pairs(measured, cfg):
    """The measures of several models on the pairs that all of them can score. Prints how many are left out; raises BadInput if all are."""
    fits = torch.stack([measures["scorable"] for measures in measured]).all(0)  # (n,)
    if not fits.any():
        raise BadInput(f"no pair has a scored token: every prompt fills --max_len {cfg.max_len}; raise it, or set --max_prompt")
    if not fits.all():
        print(f"{int((~fits).sum())} of {len(fits)} rows are left out: their prompt alone fills --max_len {cfg.max_len} in the tokens of "
              "at least one model (--max_prompt shortens it)")
    return [{name: values[fits] for name, values in measures.items()} for measures in measured]


def policy_row(name, measures, ref_measures):
    """One policy's row of the first table: numbers with their intervals."""
    chosen, rejected = measures["chosen"], measures["rejected"]
    implicit = wins(chosen - ref_measures["chosen"], rejected - ref_measures["rejected"])
    per_token = chosen / measures["chosen_tokens"].clamp(min=1) - rejected / measures["rejected_tokens"].clamp(min=1)
    return {
        "policy": name, "n": len(chosen), "nll": ratio_interval(-chosen, measures["chosen_tokens"]),
        "gap": mean_interval(chosen - rejected), "gap_per_token": mean_interval(per_token),
        "implicit_accuracy": share_interval(implicit, len(chosen)),
    }


@torch.no_grad()
def sample_measures(policy, tokenizer, ref, prompts, reward_fn, cfg):
    """Sample n answers to N prompts: {'texts': N·n strings, 'rewards': (N, n) or None, 'kl': (N,) nats, 'tokens', 'finished': (N·n,)}.

    If ref is None (it has another vocabulary), kl is None. A prompt that leaves no room for max_new loses its beginning.
    """
    room = policy.config.max_len - cfg.max_new
    rows = encode_prompts(tokenizer, prompts, max_prompt=min(cfg.max_prompt or room, room))
    texts, rewards, kl, tokens, finished = [], [], [], [], []
    seeds = [(cfg.seed, i // cfg.batch_size * cfg.batch_size) for i in range(len(rows))]
    most = most_rows(policy, max(len(ids) for ids, _ in rows) + cfg.max_new)  # on a GPU many batches are drawn together
    size = max(cfg.batch_size, most // cfg.n) if most else cfg.batch_size
    for start in range(0, len(rows), size):
        prompts_ids = [ids for ids, _ in rows[start : start + size]]
        own_seeds = seeds[start : start + size]
        answers = sample(policy, prompts_ids, max_new=cfg.max_new, tau=cfg.tau, n=cfg.n, eos_id=tokenizer.eos_id, seed=own_seeds)
        written = [tokenizer.decode(ids) for ids in answers.completions]
        texts += written
        if reward_fn is not None:  # at once, so that a reward that fails does so before hours of sampling
            asked = [prompt for prompt in prompts[start : start + size] for _ in range(cfg.n)]
            rewards.append(ask_or_stop(reward_fn, asked, written, cfg).view(-1, cfg.n))
        tokens.append(answers.lengths.cpu().double())
        finished.append(answers.finished.cpu().double())
        if ref is not None:
            ref_logps = in_micro(lambda micro: token_logps(ref, micro, tau=cfg.tau), answers, cfg.batch_size)  # (B, T)
            logps = comparable_logps(policy, answers, cfg.tau, cfg.batch_size)  # (B, T)
            logratio = k1(logps, ref_logps).sum(1)  # (B,)
            kl.append(logratio.view(-1, cfg.n).mean(1).cpu().double())
    return {"texts": texts, "rewards": torch.cat(rewards) if rewards else None, "kl": torch.cat(kl) if kl else None,
            "tokens": torch.cat(tokens), "finished": torch.cat(finished)}


def ask_or_stop(reward_fn, prompts, texts, cfg):
    """The rewards of any number of texts, (n,). --reward_limit is for each batch."""
    batches = [slice(start, start + cfg.batch_size) for start in range(0, len(texts), cfg.batch_size)]
    try:
        return torch.cat([ask(reward_fn, prompts[batch], texts[batch], limit=cfg.reward_limit).double() for batch in batches])
    except BadReward as error:
        raise BadInput(str(error)) from None


def win_shares(rewards, others):
    """(N, n) rewards of two policies' answers to the same prompts -> (N,): share of the n·n comparisons won. A tie counts one half."""
    left, right = rewards[:, :, None], others[:, None, :]
    return ((left > right).double() + 0.5 * (left == right).double()).mean((1, 2))


def sample_row(measures, opponent, ref_rewards):
    """One policy's part of the second table: numbers with their intervals. opponent: the measures of the opponent in the win rate.
    ref_rewards: those of answers of ref that were drawn independently; `needed` is counted from them."""
    row = {"distinct": len(set(measures["texts"])) / len(measures["texts"]), "mean_length": float(measures["tokens"].mean()),
           "finished": float(measures["finished"].mean())}
    if measures["kl"] is not None:
        row["kl"] = mean_interval(measures["kl"])
    if measures["rewards"] is not None:
        row["reward"] = mean_interval(measures["rewards"].mean(1))
        shares = win_shares(measures["rewards"], opponent["rewards"])
        row["win_rate"] = share_interval(float(shares.sum()), len(shares))
    if "kl" in row and "reward" in row:
        needed, half = needed_kl(*reward_classes(measures["rewards"], ref_rewards))
        row |= {"needed": (needed, half), "wasted": (row["kl"][0] - needed, math.hypot(row["kl"][1], half))}
    return row


def main(cfg):
    """Print the tables and return the list of their rows as dicts."""
    if not cfg.policies and not cfg.reward:
        raise BadInput("nothing to evaluate: name --policies, --reward or both")
    if not 0 < cfg.held_out <= 1:
        raise BadInput(f"--held_out {cfg.held_out}: must lie in (0, 1]")
    if cfg.n < 0 or cfg.show < 0:
        raise BadInput(f"--n {cfg.n} --show {cfg.show}: must be at least 0")
    if cfg.figure and not (cfg.reward and cfg.policies and cfg.n):
        raise BadInput("--figure draws reward over √KL: it needs --policies, --reward and --n at least 1")
    check_config(replace(cfg, held_out=min(cfg.held_out, 0.9), n=max(cfg.n, 1)))
    if cfg.out:
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    if cfg.figure:
        figure_path("--figure", cfg.figure)
    device, dtype = pick_device(cfg.device), pick_dtype(cfg.dtype)
    pairs = builtin_pairs() if cfg.pairs == "builtin" else read_preferences(cfg.pairs, skip_bad=cfg.skip_bad)
    pairs = pairs if cfg.held_out == 1 else split_held_out(pairs, cfg.held_out)[1]
    if not pairs:
        raise BadInput(f"{cfg.pairs}: --held_out {cfg.held_out} leaves no pairs; raise it")
    prompts = [pair.prompt for pair in pairs]

    def load(name, head="lm"):
        model, tokenizer, _ = load_model(name, dtype=dtype, device=device)
        model.requires_grad_(False)
        if model.config.head != head:
            what, flag = ("policy", "--policies") if head == "scalar" else ("reward model", "--reward")
            raise BadInput(f"{name}: is a {what}: name it with {flag}")
        if head == "lm" and cfg.n and model.config.max_len <= cfg.max_new:
            raise BadInput(f"--max_new {cfg.max_new}: the policy's context is {model.config.max_len} tokens")
        return model, tokenizer

    judge, measured = None, []  # judge: the first reward, which scores the answers; measured: of the rewards, then of the policies
    for spec in cfg.reward:
        if reward_folders([spec]):  # a reward model: rows are cut as in training
            reward_model, tokenizer = load(spec, "scalar")
            reward_fn = learned(reward_model, tokenizer)
            measures = pair_measures(reward_model, tokenizer, pairs, cfg)
        else:
            reward_fn = open_reward([spec], prompts=cfg.pairs, device=device, dtype=dtype, skip_bad=cfg.skip_bad)
            measures = {"chosen": ask_or_stop(reward_fn, prompts, [plain_text(pair.chosen) for pair in pairs], cfg),
                        "rejected": ask_or_stop(reward_fn, prompts, [plain_text(pair.rejected) for pair in pairs], cfg),
                        "readable": torch.ones(len(pairs), dtype=torch.bool), "scorable": torch.ones(len(pairs), dtype=torch.bool)}
        judge = judge or reward_fn
        measured.append(measures)
    names = list(dict.fromkeys([cfg.ref or cfg.policies[0], *cfg.policies])) if cfg.policies else []  # the reference comes first
    if names:
        ref, ref_tokenizer = load(names[0])

    def open_named(name):
        return (ref, ref_tokenizer) if name == names[0] else load(name)

    for name in names:
        measured.append(pair_measures(*open_named(name), pairs, cfg))
    readable = torch.stack([measures["readable"] for measures in measured]).all(0)  # (n,)
    prompts = [prompt for prompt, good in zip(prompts, readable.tolist(), strict=True) if good]
    measured = common_pairs([{name: values[readable] for name, values in measures.items()} for measures in measured], cfg)
    of_policy = dict(zip(names, measured[len(cfg.reward) :], strict=True))
    rows = [policy_row(name, of_policy[name], of_policy[names[0]]) for name in cfg.policies]
    if rows:
        print_pairs(rows, names[0], cfg)
    reward_rows = []
    for spec, measures in zip(cfg.reward, measured, strict=False):
        n, won = len(measures["chosen"]), wins(measures["chosen"], measures["rejected"])
        reward_rows.append({"reward": spec, "n": n, "accuracy": share_interval(won, n)})
        print("reward {}: accuracy {:.1%} [{:.1%}, {:.1%}] on {} pairs".format(spec, *reward_rows[-1]["accuracy"], n), flush=True)
    if rows and cfg.n:
        written, opponent = {}, cfg.against or names[0]
        # Other answers of ref than those in the table: with the same seed a policy near ref would give the same ones.
        ref_rewards = judge and sample_measures(ref, ref_tokenizer, None, prompts, judge, replace(cfg, seed=-1 - cfg.seed))["rewards"]
        for name in dict.fromkeys([opponent, *cfg.policies]):  # each is loaded again: the models together may not fit in memory
            policy, tokenizer = open_named(name)
            same = tokenizer.inner.get_vocab() == ref_tokenizer.inner.get_vocab()
            written[name] = sample_measures(policy, tokenizer, ref if same else None, prompts, judge, cfg)
        for row in rows:
            row |= sample_row(written[row["policy"]], written[opponent], ref_rewards)
        print_answers(rows, written, opponent, prompts, cfg)
    if cfg.out:
        known = [{name: finite(value) for name, value in row.items()} for row in rows + reward_rows]
        write_atomic(cfg.out, json.dumps(known, indent=1) + "\n")
    if cfg.figure:
        draw_frontier(rows, cfg.reward[0], cfg.figure)
    return rows + reward_rows


def finite(value):
    """Convert a value for JSON, which has no NaN: NaN (the interval of a single row) becomes null. A tuple becomes a list."""
    if isinstance(value, tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def print_pairs(rows, ref_name, cfg):
    """Print the table of the pairs."""
    print(f"{rows[0]['n']} pairs of {cfg.pairs}; ± and [ ] are 95 % intervals; implicit reward and KL against {ref_name}")
    print(f"{'policy':40} {'NLL / token':>18} {'gap, nats':>20} {'gap / token':>20} {'implicit acc.':>22}")
    for row in rows:
        accuracy = "    (is the reference)" if row["policy"] == ref_name else "{:6.1%} [{:.1%}, {:.1%}]".format(*row["implicit_accuracy"])
        print(f"{row['policy'][-40:]:40} {row['nll'][0]:9.4f} ± {row['nll'][1]:.4f} {row['gap'][0]:+11.3f} ± {row['gap'][1]:6.3f} "
              f"{row['gap_per_token'][0]:+11.4f} ± {row['gap_per_token'][1]:.4f} {accuracy:>22}")


def print_answers(rows, written, opponent, prompts, cfg):
    """Print the table of the answers, and some answers side by side."""
    judged = f"; reward {cfg.reward[0]}, wins over {opponent}" if cfg.reward else ""
    print(f"\nanswers to each of {len(prompts)} prompts: {cfg.n}{judged}")
    kinds = f"{'needed':>18} {'wasted':>18} " if cfg.reward else ""
    print(f"{'policy':40} {'reward':>18} {'win rate':>24} {'KL, nats':>18} {kinds}{'distinct':>9} {'tokens':>7} {'finished':>9}")
    for row in rows:
        reward = "{:9.4f} ± {:.4f}".format(*row["reward"]) if "reward" in row else ""
        won = "{:6.1%} [{:.1%}, {:.1%}]".format(*row["win_rate"]) if "reward" in row else ""
        kl = "{:9.3f} ± {:.3f}".format(*row["kl"]) if "kl" in row else "other tokens"
        split = "".join("{:>18} ".format("{:9.3f} ± {:.3f}".format(*row[name]) if name in row else "") for name in ("needed", "wasted"))
        print(f"{row['policy'][-40:]:40} {reward:>18} {won if row['policy'] != opponent else '(is the opponent)':>24} {kl:>18} "
              f"{split if cfg.reward else ''}{row['distinct']:9.1%} {row['mean_length']:7.1f} {row['finished']:9.1%}")
    for i in dict.fromkeys(prompts.index(prompt) for prompt in prompts[: cfg.show]):
        print(f"\n{plain_text(prompts[i])[-300:]}")
        for row in rows:
            measures = written[row["policy"]]
            paid = f"  ({measures['rewards'][i, 0]:.3g})" if measures["rewards"] is not None else ""
            print(f"  {row['policy'][-30:]:30} ⟦{measures['texts'][i * cfg.n][:300]}⟧{paid}")


def draw_frontier(rows, reward, path):
    """Plot reward over √KL(π‖ref), one point with its 95 % interval for each policy. Raises BadInput if no policy has a KL."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = [row for row in rows if "kl" in row]
    if not points:
        raise BadInput("--figure draws reward over √KL: it needs policies that share the reference's tokens")
    figure, axis = plt.subplots(figsize=(6, 4.2), constrained_layout=True)
    for row in points:
        (reward_mean, reward_half), (kl, kl_half) = row["reward"], row["kl"]
        x, low, high = (math.sqrt(max(value, 0)) for value in (kl, kl - kl_half, kl + kl_half))
        axis.errorbar(x, reward_mean, yerr=reward_half, xerr=[[x - low], [high - x]], fmt="o", ms=5, capsize=2, lw=1)
        axis.annotate(Path(row["policy"]).parent.name if Path(row["policy"]).name == "final" else row["policy"], (x, reward_mean),
                      xytext=(5, 4), textcoords="offset points", fontsize=8)
    axis.set(xlabel="√KL(π‖ref), √nats", ylabel=f"reward {reward}"[-60:], title="Reward over distance from the reference")
    figure.savefig(path, dpi=140)
    plt.close(figure)
    print(f"figure: {path}")
