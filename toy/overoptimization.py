"""Over-optimisation: best-of-n or RL on a proxy that is blind to one feature of the true reward lowers the true reward if pushed too far.

We use the larger language of tiny_language.py. Its true ("gold") reward punishes adjacent repeats by −.7·repeats²: two repeats cost more
than two liked tokens bring. Comparisons of ref's own completions are labelled by Bradley-Terry on gold. A proxy is the Bradley-Terry
optimum among rewards that are linear in token counts. Ids are taken relative to the prompt's, so that one weight serves all prompts. Such a
proxy cannot see repeats. The control has one more feature, repeats², so it can equal gold. The policies are not trained but known exactly:

    best-of-n   closed_form.best_of_n_law on the proxy, n = 1, 2, 4, …
    RL          closed_form.tilt: ref·e^{proxy/β}, β from 100 to .03; training on RLOO's own expected loss is checked to end there

So gold, proxy and d = √KL(π‖ref) are sums over all 1555 completions of each prompt, and only the comparisons are random. Gates check what
follows: for its KL the tilt has the most proxy (it maximises E[proxy] − β·KL). The KL of best-of-n is at most log n − (n − 1)/n.
RL leaves ref with slope √2·cov(gold, proxy)/σ(proxy), since at small 1/β gold gains cov/β and KL is σ²/2β². RL's curve is nearly a parabola
in d: if the proxy is Gaussian under ref, raising it by s standard deviations costs a KL of s²/2. So s is proportional to d, and with a
loss in proportion to s² gold is a·d − b·d². Gao et al. 2022 (arXiv:2210.10760) give this form to best-of-n, not to RL.

    python -m toy.overoptimization                                 # PASS or FAIL, claims with verdicts, a figure; exit 1 on a miss
    python -m toy.overoptimization --full                          # three times the seeds
    python -m toy.overoptimization --comparisons 10000 --members 10  # more labels, a larger ensemble

The gates assume a thousand comparisons or more, and this ref. With another ref the proxy's favourite may repeat twice instead of three
times, and gold may fall by less than 1 (a claim counts how often). We try ensembles against the fall (Coste et al. 2023, arXiv:2310.02743;
Eisenstein et al. 2023, arXiv:2312.09244), and averaged weights (WARM, Ramé et al. 2024, arXiv:2401.12187), which equal the mean ensemble
for a linear reward. Small neural reward models could see repeats. Whether they learn to depends on the draw, so they have no gate.

Checked by tests/toy/test_overoptimization.py.
"""

import copy
import math
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch

from minialign.batch import Batch, collate
from minialign.engine.common import BadInput, batch_rows, derive_seed
from minialign.methods.best_of_n import kl_bound
from minialign.methods.reward_model import bradley_terry_loss
from minialign.pairs import label_by_reward
from minialign.rewards import ensemble, score, weight_average
from minialign.settings import cli, exit_codes
from toy import closed_form
from toy.report import Report
from toy.tiny_language import Language, TabularPolicy, expected_rloo, tiny_gpt


@dataclass
class Config:
    comparisons: int = 1000         # labelled pairs to fit a proxy to, over all prompts
    few: int = 100                  # labelled pairs for the claims about noise instead of blindness
    ridge: float = 1.0              # weight of ½·|w|², added to the summed Bradley-Terry loss
    members: int = 5                # proxies in an ensemble, each fitted to a bootstrap sample of the same comparisons
    largest_n: int = 16384          # the largest n of best-of-n
    seeds: int = 10                 # draws of the comparisons; every one must pass
    neural_seeds: int = 3           # draws for the neural reward models; 0 skips them
    neural_members: int = 3         # neural reward models in an ensemble
    neural_steps: int = 100         # updates of a neural reward model
    full: bool = False              # use three times the seeds
    out: str = "runs/overoptimization.png"  # path of the figure


D, PROXY, GOLD = 0, 1, 2  # the columns of a curve
BETAS = np.geomspace(100, 0.03, 40)
METHODS = ("best-of-n", "RL")


# ---------------------------------------------------------------------------------------------------- gold, proxies, ensembles


def repeats(completion):
    return sum(a == b for a, b in zip(completion, completion[1:], strict=False))


class Gold(Language):
    """The enumerable language with a quadratic penalty for repeats."""

    def reward(self, prompt, completion):
        n = repeats(completion)
        return round(super().reward(prompt, completion) + 0.4 * n - 0.7 * n**2, 9)


def features(language, sees_repeats):
    """(N, C, F): counts of the content tokens, starting at the prompt's token, then of EOS, then, if sees_repeats, repeats²."""
    content = language.vocab_size - 1
    rows = [[[*(y.count((x + shift) % content) for shift in range(content)), y.count(language.eos_id),
              *([repeats(y) ** 2] if sees_repeats else [])] for y in language.completions] for (x,) in language.prompts]
    return torch.tensor(rows, dtype=torch.float64)


def compare(language, ref, n, seed):
    """n comparisons of two completions drawn from ref (N, C), labelled by Bradley-Terry on gold: (n, 3) of prompt, chosen, rejected."""
    each = -(-n // len(language.prompts))
    answers = language.draw(ref, 2 * each, torch.Generator().manual_seed(derive_seed("drawn", seed)))
    asked = [x for x in language.prompts for _ in range(each)]
    gold = language.scores([x for x in asked for _ in range(2)], answers)
    rows = label_by_reward(asked, answers.completions, gold, derive_seed("labelled", seed))[:n]
    return torch.tensor([(x[0], language.index[tuple(chosen)], language.index[tuple(rejected)]) for x, chosen, rejected in rows])


def bootstrap(compared, seed):
    """A sample of the comparisons, drawn with replacement, of the same size."""
    return compared[torch.randint(len(compared), (len(compared),), generator=torch.Generator().manual_seed(seed))]


def fit(seen, compared, ridge):
    """Fit the linear reward model that minimises the Bradley-Terry loss plus ridge (convex). Returns nn.Linear over features (N, C, F)."""
    model = torch.nn.Linear(seen.shape[-1], 1, bias=False, dtype=torch.float64)
    model.config = SimpleNamespace(reward_offset=0.0)  # minialign.rewards.weight_average reads it
    torch.nn.init.zeros_(model.weight)
    prompt, chosen, rejected = compared.T
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=500, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss, _ = bradley_terry_loss(model(seen[prompt, chosen])[:, 0], model(seen[prompt, rejected])[:, 0])
        loss = loss + ridge / (2 * len(compared)) * (model.weight**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


@torch.no_grad()
def scores(model, seen):
    """The scores (N, C) of a linear reward model, rounded because best-of-n depends on ties."""
    return model(seen)[..., 0].numpy().round(9)


def combine(columns, how):
    """Combine scores [(N, C)] by minialign.rewards.ensemble. The functions given to it ignore their arguments and return the scores."""
    fns = [lambda prompts, completions, column=column: column.ravel() for column in columns]
    return ensemble(fns, how)(None, None).double().numpy().reshape(columns[0].shape)


class Nets:
    """Small neural reward models: the trunk of the reference with a scalar head, evaluated by minialign.rewards.score."""

    def __init__(self, language, policy, cfg):
        self.language, self.policy, self.cfg, self.shape = language, policy, cfg, (len(language.prompts), len(language.completions))
        asked = [x for x in language.prompts for _ in language.completions]
        self.rows = collate(asked, [list(y) for y in language.completions] * len(language.prompts), pad_id=language.eos_id)

    def start(self, seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return copy.deepcopy(self.policy).float().with_scalar_head()

    def train(self, start, compared, seed, batch_size=64, lr=1e-3):
        model, steps = copy.deepcopy(start).requires_grad_(True), self.cfg.neural_steps
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        for k in range(steps):
            optimizer.param_groups[0]["lr"] = lr * (1 - k / steps)
            prompt, chosen, rejected = compared[batch_rows(len(compared), batch_size, k, seed)].T
            picked = torch.cat([prompt * self.shape[1] + chosen, prompt * self.shape[1] + rejected])
            rewards = score(model, Batch(self.rows.inputs[picked], self.rows.targets[picked], self.rows.mask[picked]))
            loss, _ = bradley_terry_loss(rewards[:batch_size], rewards[batch_size:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model.requires_grad_(False)

    def scores(self, model):
        with torch.no_grad():
            return score(model, self.rows).view(self.shape).double().numpy()


# ------------------------------------------------------------------------------------------------------------ exact curves


def point(ref, laws, proxy, gold):
    """(d, proxy, gold) of a policy. Each is averaged over prompts, the KL before its root is taken. All inputs are (N, C)."""
    divergence = np.mean([closed_form.kl(law, p) for law, p in zip(laws, ref, strict=True)])
    return math.sqrt(max(divergence, 0.0)), (laws * proxy).sum(1).mean(), (laws * gold).sum(1).mean()


def best_of(ref, proxy, n):
    return np.stack([closed_form.best_of_n_law(p, r, n) for p, r in zip(ref, proxy, strict=True)])


def tilted(ref, proxy, beta):
    return np.stack([closed_form.tilt(p, r, beta) for p, r in zip(ref, proxy, strict=True)])


def curves(ref, proxy, gold, ns):
    """The curves of both methods against one proxy: {method: (points, 3)}. The first point of best-of-n, n = 1, is ref."""
    laws = [best_of(ref, proxy, n) for n in ns], [tilted(ref, proxy, beta) for beta in BETAS]
    return {method: np.array([point(ref, law, proxy, gold) for law in of]) for method, of in zip(METHODS, laws, strict=True)}


def tilt_like(ref, proxy, gold, target, column):
    """The point on RL's curve with the same d, or the same proxy, as the point `target`. Both rise as β falls, so we bisect β."""
    low, high = math.log(1e-3), math.log(1e5)
    for _ in range(35):
        middle = (low + high) / 2
        found = point(ref, tilted(ref, proxy, math.exp(middle)), proxy, gold)
        low, high = (middle, high) if found[column] > target[column] else (low, middle)
    return found


def fall(curve):
    """How far gold ends below its highest point."""
    return curve[:, GOLD].max() - curve[-1, GOLD]


def mean_fall(both):
    return np.mean([fall(both[method]) for method in METHODS])


FORMS = {"best-of-n": lambda d: np.stack([d, -(d**2)], 1), "RL": lambda d: np.stack([d, -d * np.log(d)], 1)}


def gao(curve, form, points=50):
    """Fit gold − gold(ref) = d(α − βd), or d(α − β·log d), by least squares at equally spaced d from .1 on. Returns ((α, β), R²)."""
    d = np.linspace(0.1, curve[-1, D], points)
    gained = np.interp(d, curve[:, D], curve[:, GOLD]) - curve[0, GOLD]
    parts = FORMS[form](d)
    coefficients = np.linalg.lstsq(parts, gained, rcond=None)[0]
    return coefficients, 1 - ((parts @ coefficients - gained) ** 2).sum() / ((gained - gained.mean()) ** 2).sum()


def initial_slope(ref, proxy, gold):
    """d gold/d d at ref along the tilt: √2·mean cov(gold, proxy)/√(mean var(proxy)), means over prompts."""
    centred = proxy - (ref * proxy).sum(1, keepdims=True)
    return math.sqrt(2) * (ref * centred * gold).sum(1).mean() / math.sqrt((ref * centred**2).sum(1).mean())


def rloo_laws(language, ref, proxy, beta, steps=300, lr=0.2):
    """The policies at which RLOO ends: a logit per prefix and token, trained with Adam on the loss's expectation over all completions."""
    laws = []
    for law, rewards in zip(ref, torch.tensor(proxy), strict=True):
        policy = TabularPolicy(language, law)
        ref_logps = policy.token_logps().detach()
        optimizer = torch.optim.Adam([policy.logits], lr=lr, betas=(0.9, 0.99))
        for k in range(steps):
            optimizer.param_groups[0]["lr"] = lr * (1 - k / steps)
            logps = policy.token_logps()
            loss = expected_rloo(logps, ref_logps, rewards, logps.detach().sum(1).exp(), language, beta)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        laws.append(policy.token_logps().detach().sum(1).exp().numpy())
    return np.stack(laws)


# ----------------------------------------------------------------------------------------------------------------- the runs


class Setting:
    """What all seeds share: the language, the reference and the features of the proxies."""

    def __init__(self, ref_seed=0):
        self.language = Gold()
        self.policy = tiny_gpt(self.language.vocab_size, seed=ref_seed, mixing=0.3).requires_grad_(False)
        self.law = self.language.law_of(self.policy)
        self.ref, self.gold = self.law.numpy(), self.language.rewards.numpy()
        self.blind, self.seeing = features(self.language, False), features(self.language, True)

    def compare(self, n, seed):
        return compare(self.language, self.law, n, seed)

    def curves(self, proxy, cfg, factor=4):
        """factor: each n divided by the one before. A finer grid finds a higher peak, so compare falls only over the same n."""
        return curves(self.ref, proxy, self.gold, [factor**k for k in range(1 + int(math.log(cfg.largest_n, factor) + 1e-9))])

    def ends(self, proxy, cfg):
        """The mean of gold at the largest n and gold at the smallest β."""
        laws = best_of(self.ref, proxy, cfg.largest_n), tilted(self.ref, proxy, BETAS[-1])
        return np.mean([point(self.ref, law, proxy, self.gold)[GOLD] for law in laws])


def linear_run(setting, cfg, seed):
    """All exact results for one draw of the comparisons: the curves against each proxy and what compares the two methods."""
    compared = setting.compare(cfg.comparisons, seed)
    blind = fit(setting.blind, compared, cfg.ridge)
    proxy = scores(blind, setting.blind)
    fine = setting.curves(proxy, cfg, factor=2)  # a finer curve, to fit Gao's forms to
    run = {"proxy": proxy, "fine": fine, "blind": {"best-of-n": fine["best-of-n"][::2], "RL": fine["RL"]}}
    run["control"] = setting.curves(scores(fit(setting.seeing, compared, cfg.ridge), setting.seeing), cfg)

    samples = [bootstrap(compared, derive_seed("member", seed, k)) for k in range(cfg.members)]
    members = [fit(setting.blind, sample, cfg.ridge) for sample in samples]
    columns = [scores(member, setting.blind) for member in members]
    run |= {how: setting.curves(combine(columns, how), cfg) for how in ("mean", "min")}
    run["warm off"] = np.abs(scores(weight_average(members), setting.blind) - combine(columns, "mean")).max()

    few = setting.compare(cfg.few, derive_seed("few", seed))
    samples = [bootstrap(few, derive_seed("member", seed, k)) for k in range(cfg.members)]
    columns = [scores(fit(setting.seeing, sample, cfg.ridge), setting.seeing) for sample in (few, *samples)]
    run["few"] = {"single": setting.ends(columns[0], cfg), **{how: setting.ends(combine(columns[1:], how), cfg) for how in ("mean", "min")}}

    best = run["blind"]["best-of-n"][1:]
    for name, column in (("same KL", D), ("same proxy", PROXY)):
        run[name] = np.array([tilt_like(setting.ref, proxy, setting.gold, target, column) for target in best])
    slight = point(setting.ref, tilted(setting.ref, proxy, 1e4), proxy, setting.gold)
    run["slope"] = (slight[GOLD] - run["blind"]["best-of-n"][0, GOLD]) / slight[D], initial_slope(setting.ref, proxy, setting.gold)
    return run


def reference_run(cfg, seed):
    """The curves against a blind proxy with another reference."""
    other = Setting(seed)
    return other.curves(scores(fit(other.blind, other.compare(cfg.comparisons, seed), cfg.ridge), other.blind), cfg)


def neural_run(setting, nets, cfg, seed):
    compared, start = setting.compare(cfg.comparisons, seed), nets.start(seed)
    members = [nets.train(start, bootstrap(compared, derive_seed("member", seed, k)), derive_seed("order", seed, k))
               for k in range(cfg.neural_members)]
    columns = [nets.scores(member) for member in members]
    proxies = {"single": nets.scores(nets.train(start, compared, seed)), "mean": combine(columns, "mean"), "min": combine(columns, "min"),
               "WARM": nets.scores(weight_average(members))}
    return {name: setting.curves(proxy, cfg) for name, proxy in proxies.items()}


def rloo_run(setting, proxy):
    """[(β, KL(π‖tilt), gold of π, gold of the tilt)] of policies trained on the proxy, with a β before and a β after gold has fallen."""
    found = []
    for beta in (0.5, 0.1):
        laws, expected = rloo_laws(setting.language, setting.ref, proxy, beta), tilted(setting.ref, proxy, beta)
        ends = [point(setting.ref, x, proxy, setting.gold)[GOLD] for x in (laws, expected)]
        found.append((beta, np.mean([closed_form.kl(p, q) for p, q in zip(laws, expected, strict=True)]), *ends))
    return found


# ------------------------------------------------------------------------------------------------------- gates and verdicts


def table(runs, names):
    print(f"{'gold against':18}{'ref':>8}" + "".join(f"{method:>14}{'peak':>8}{'at d':>7}{'end':>8}{'fall':>16}" for method in METHODS))
    for name in names:
        cells = f"{name:18}{np.mean([run[name]['best-of-n'][0, GOLD] for run in runs]):8.2f}"
        for method in METHODS:
            of = [run[name][method] for run in runs]
            peaks, falls = [curve[curve[:, GOLD].argmax()] for curve in of], [fall(curve) for curve in of]
            cells += f"{'':14}{np.mean([p[GOLD] for p in peaks]):8.2f}{np.mean([p[D] for p in peaks]):7.2f}"
            cells += f"{np.mean([curve[-1, GOLD] for curve in of]):8.2f}{np.mean(falls):9.2f} ± {np.std(falls):.2f}"
        print(cells)


def judge(report, cfg, runs, rloo):
    """The gates and claims for the linear proxies. Returns the fits of Gao's forms, {(method, form): rows}."""
    for method in METHODS:
        falls = [fall(run["blind"][method]) for run in runs]
        rises = [run["blind"][method][:, GOLD].max() - run["blind"]["best-of-n"][0, GOLD] for run in runs]
        report.gate(f"{method}, blind proxy: gold rises, then falls by ≥ 1", min(falls) >= 1 and min(rises) > 0.1,
                    f"rises by {min(rises):.2f} or more, falls by {min(falls):.2f} to {max(falls):.2f}")
        falls = [fall(run["control"][method]) for run in runs]
        report.gate(f"{method}, proxy that sees repeats: no fall above .1", max(falls) <= 0.1, f"falls by {max(falls):.3f} at most")
    costs = np.array([run["blind"]["best-of-n"][1:, D] ** 2 for run in runs])
    bounds = np.array([kl_bound(4**k) for k in range(1, costs.shape[1] + 1)])
    report.gate("KL(best of n‖ref) ≤ log n − (n − 1)/n", (costs <= bounds + 1e-12).all(), f"{(costs / bounds).max():.4f} of it at most")
    spare = np.array([run["same KL"][:, PROXY] - run["blind"]["best-of-n"][1:, PROXY] for run in runs])
    report.gate("the tilt has more proxy for the KL of any best-of-n", spare.min() >= -1e-9, f"by {spare.min():.4f} to {spare.max():.3f}")
    slopes = np.array([run["slope"] for run in runs])
    report.check("slope of RL's curve at ref", slopes[:, 0], slopes[:, 1], 1e-3, "√2·cov(gold, proxy)/σ(proxy)")
    report.check("linear: averaged weights are the mean ensemble", [run["warm off"] for run in runs], 0, 1e-6, "float32 in ensemble()")
    for beta, divergence, gold, expected in rloo:
        report.gate(f"RLOO at β = {beta:g} ends on the tilt", divergence <= 0.01 and abs(gold - expected) <= 0.02,
                    f"KL(π‖tilt) {divergence:.1e}, gold {gold:.3f}, the tilt's {expected:.3f}")

    fits = {(method, form): [gao(run["fine"][method], form) for run in runs] for method in METHODS for form in FORMS}
    print()
    for (method, form), rows in fits.items():
        (alpha, beta), r2 = np.mean([row[0] for row in rows], 0), [row[1] for row in rows]
        print(f"      gold of {method:9} as d(α − {'βd' if form == 'best-of-n' else 'β·log d'}): ".ljust(48)
              + f"α {alpha:.2f}, β {beta:.2f}, R² {np.mean(r2):.3f} (least {min(r2):.3f})")
    for method, other in zip(METHODS, METHODS[::-1], strict=True):
        better = [own[1] - wrong[1] for own, wrong in zip(fits[method, method], fits[method, other], strict=True)]
        report.claim("Gao et al. 2022", f"the gold of {method} has its own form rather than that of {other}", "difference of R²", better)
    bests = [run["blind"]["best-of-n"][1:] for run in runs]
    report.claim("Gao et al. 2022", "for the same KL, RL optimises the proxy less than best-of-n", "proxy, best-of-n − RL",
                 [(best - run["same KL"])[:, PROXY].mean() for best, run in zip(bests, runs, strict=True)])
    report.claim("Gao et al. 2022", "for the same proxy, both have about the same gold", ".1 − |gold of best-of-n − gold of RL|",
                 [0.1 - np.abs((best - run["same proxy"])[:, GOLD]).mean() for best, run in zip(bests, runs, strict=True)])
    report.claim("toy", "for the same KL, best-of-n has more gold than RL", "gold, best-of-n − RL, mean over n",
                 [(best - run["same KL"])[:, GOLD].mean() for best, run in zip(bests, runs, strict=True)])
    for how in ("mean", "min"):
        falls = [mean_fall(run[how]) for run in runs]
        source = "Coste et al. 2023" if how == "min" else "toy"  # its claim is about pessimistic ensembles
        report.claim(source, f"the {how} of {cfg.members} blind proxies removes the fall", ".1 − what is left",
                     [0.1 - left for left in falls])
        report.claim("Eisenstein et al. 2023", f"the {how} of {cfg.members} blind proxies makes the fall smaller", "single − ensemble",
                     [mean_fall(run["blind"]) - left for run, left in zip(runs, falls, strict=True)])
    for how in ("mean", "min"):
        report.claim("toy", f"seeing proxies of {cfg.few} comparisons: the {how} of {cfg.members} ends on more gold than a single one",
                     "gold, ensemble − single", [run["few"][how] - run["few"]["single"] for run in runs])
    return fits


def judge_references(report, others):
    smallest = [min(fall(both[method]) for method in METHODS) for both in others]
    measured = f"{sum(x >= 1 for x in smallest)} of {len(others)} others, least {min(smallest):.2f}"
    report.claim("toy", "the fall is at least 1 whatever the reference", measured, holds=min(smallest) >= 1)


def judge_nets(report, nets_runs):
    """Print shares and claims for neural reward models, without gates."""
    for name in nets_runs[0]:
        shares = [f"{sum(fall(run[name][method]) > 0.2 for run in nets_runs)}/{len(nets_runs)} by {method}" for method in METHODS]
        print(f"      gold falls by more than .2 against neural, {name}: {', '.join(shares)} (not gated)")
    for name in ("mean", "min", "WARM"):
        source = "Ramé et al. 2024" if name == "WARM" else "Eisenstein et al. 2023"
        report.claim(source, f"{name} of neural reward models makes the fall smaller", "single − ensemble",
                     [mean_fall(run["single"]) - mean_fall(run[name]) for run in nets_runs])


def draw_figure(cfg, runs, fits, nets_runs):
    """Draw blind proxy and control over d, Gao's forms on the first seed, the fall left by ensembles, and neural reward models."""
    import matplotlib

    matplotlib.use("Agg")  # not at the top of the file, so that a notebook that imports it keeps its own backend
    import matplotlib.pyplot as plt

    figure, ((left, middle, right), (falls, nets_axis, nets_falls)) = plt.subplots(2, 3, figsize=(14, 7.6), constrained_layout=True)
    colors = dict(zip(METHODS, ("C0", "C3"), strict=True))

    def over_d(axis, of, title, with_proxy=True):
        for index, both in enumerate(of):
            ref = both["best-of-n"][0]
            for method, curve in both.items():
                name = method if not index else None
                axis.plot(curve[:, D], curve[:, GOLD] - ref[GOLD], color=colors[method], lw=1.2, alpha=0.6, label=name and f"gold, {name}")
                if with_proxy:
                    axis.plot(curve[:, D], curve[:, PROXY] - ref[PROXY], "--", color=colors[method], lw=0.8, alpha=0.5,
                              label=name and f"proxy, {name}")
        axis.axhline(0, color="k", lw=0.6)
        axis.set(xlabel="d = √KL(π‖ref)", ylabel="gained over ref", title=title)
        axis.legend(fontsize=8, loc="lower left")

    over_d(left, [run["fine"] for run in runs], f"Blind to repeats ({len(runs)} seeds)")
    over_d(middle, [run["control"] for run in runs], "The same, seeing repeats")
    middle.set_ylim(left.get_ylim())
    for method in METHODS:
        curve = runs[0]["fine"][method]
        d = np.linspace(0.1, curve[-1, D], 100)
        right.plot(curve[:, D], curve[:, GOLD] - runs[0]["blind"]["best-of-n"][0, GOLD], ".", color=colors[method], label=f"gold, {method}")
        for form, style in zip(FORMS, ("-", ":"), strict=True):
            written = "d(α − βd)" if form == "best-of-n" else "d(α − β log d)"
            right.plot(d, FORMS[form](d) @ fits[method, form][0][0], style, color=colors[method], lw=1.1,
                       label=f"{written}, R² {fits[method, form][0][1]:.3f}")
    right.axhline(0, color="k", lw=0.6)
    right.set(xlabel="d = √KL(π‖ref)", ylabel="gained over ref", title="Gao's two forms, first seed")
    right.legend(fontsize=8, loc="lower left")

    def bars(axis, of, names, labels, title):
        for index, name in enumerate(names):
            for shift, method in ((-0.2, "best-of-n"), (0.2, "RL")):
                values = [fall(run[name][method]) for run in of]
                axis.bar(index + shift, np.mean(values), 0.36, color=colors[method], alpha=0.6, label=method if not index else None)
                axis.plot([index + shift] * len(values), values, "k.", ms=4)
        axis.set_xticks(range(len(names)), labels, fontsize=8)
        axis.set(ylabel="fall of gold, peak − end", title=title)
        axis.legend(fontsize=8)

    bars(falls, runs, ("blind", "mean", "min", "control"), ("one blind\nproxy", f"mean of {cfg.members}\n(= WARM)", f"min of {cfg.members}",
                                                            "one that\nsees"), "Linear proxies: what is left of the fall")
    if nets_runs:
        over_d(nets_axis, [run["single"] for run in nets_runs], f"Neural reward model ({len(nets_runs)} seeds)", with_proxy=False)
        names = [f"{how} of {cfg.neural_members}" for how in ("mean", "min", "WARM")]
        bars(nets_falls, nets_runs, ("single", "mean", "min", "WARM"), ("one", *names), "Neural: what is left of the fall")
    else:
        nets_axis.axis("off"), nets_falls.axis("off")
    figure.savefig(cfg.out, dpi=130)
    plt.close(figure)


def main(cfg):
    """Print gates and claims, write the figure; returns True if every gate passes. Raises BadInput for arguments out of range."""
    if min(cfg.comparisons, cfg.few, cfg.members, cfg.neural_members, cfg.neural_steps, cfg.seeds) < 1 or not cfg.ridge > 0:
        raise BadInput("--comparisons, --few, --members, --neural_members, --neural_steps and --seeds must be at least 1, --ridge above 0")
    if cfg.largest_n < 4 or cfg.neural_seeds < 0:
        raise BadInput("--largest_n must be at least 4, --neural_seeds at least 0")
    report, times = Report(cfg), 3 if cfg.full else 1
    setting = Setting()
    runs = [linear_run(setting, cfg, seed) for seed in range(times * cfg.seeds)]
    nets = Nets(setting.language, setting.policy, cfg)
    nets_runs = [neural_run(setting, nets, cfg, seed) for seed in range(times * cfg.neural_seeds)]
    print(f"{len(setting.language.completions)} completions of each of {len(setting.language.prompts)} prompts, {cfg.comparisons} "
          f"comparisons, mean ± standard deviation over {len(runs)} draws of them ({len(nets_runs)} for neural reward models)")
    table(runs, ("blind", "mean", "min", "control"))
    if nets_runs:
        table(nets_runs, nets_runs[0])
    print()
    fits = judge(report, cfg, runs, rloo_run(setting, runs[0]["proxy"]))
    if cfg.seeds > 1:
        judge_references(report, [reference_run(cfg, seed) for seed in range(1, cfg.seeds)])
    if nets_runs:
        judge_nets(report, nets_runs)
    draw_figure(cfg, runs, fits, nets_runs)
    return report.close({"blind": [{method: curve.round(6).tolist() for method, curve in run["blind"].items()} for run in runs]})


if __name__ == "__main__":
    with exit_codes("overoptimization"):
        sys.exit(0 if main(cli(Config, sys.argv[1:], prog="python -m toy.overoptimization", description=__doc__)) else 1)
