"""PPO. Every test that takes `m` alone is also run against wrong variants of the file (tests/test_wrong_variants.py)."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.autograd import gradcheck

from minialign.batch import Rollout, whiten
from minialign.data import encode_texts
from minialign.engine import run
from minialign.engine.common import BadInput, batch_rows, derive_seed, read_rows
from minialign.methods import ppo
from minialign.model import GPT, GPTConfig
from minialign.tokenizer import load_tokenizer
from minialign.weights import load_pretrained
from tests.engine.test_parallel import go_back_to
from tests.enumerable import BETA, CLIP, LANGUAGE, Enumerated, padded, random_rows, relative
from tests.killing import result_of


@pytest.fixture
def m():
    return ppo


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


HAND = {  # (γ, λ): A and returns for r = 0 0 1, V = .5 .4 .3
    (1.0, 0.95): ([0.43675, 0.565, 0.7], [0.93675, 0.965, 1]),
    (1.0, 1.0): ([0.5, 0.6, 0.7], [1, 1, 1]),
    (1.0, 0.0): ([-0.1, -0.1, 0.7], [0.4, 0.3, 1]),
    (0.9, 0.8): ([0.12928, 0.374, 0.7], [0.62928, 0.774, 1]),
}


def test_gae_by_hand(m):
    """δ = .4−.5, .3−.4, 1−.3 for γ = 1; e.g. λ = .95: .7, −.1 + .95·.7 = .565, −.1 + .95·.565 = .43675. Alone, and with three columns of
    rubbish behind and a prompt's two before."""
    for (gamma, lam), (advantages, returns) in HAND.items():
        rewards, values, mask = f64(0, 0, 1)[None], f64(0.5, 0.4, 0.3)[None], torch.ones(1, 3).bool()
        for around in (False, True):
            if around:
                rewards, values, mask = (torch.cat([torch.full_like(x[:, :2], 9), x], dim=1) for x in padded(rewards, values, mask))
                mask[:, :2] = False
            A, G = m.gae(rewards, values, mask, gamma=gamma, lam=lam)
            assert A[mask].tolist() == pytest.approx(advantages, abs=1e-12) and G[mask].tolist() == pytest.approx(returns, abs=1e-12)
            assert not A[~mask].any() and not G[~mask].any()


def test_lambda_one_is_monte_carlo(m):
    """γ = λ = 1: returns are the sums of what is still to come, whatever V is, row by row with unequal lengths."""
    rewards, values, _, mask = random_rows()
    A, G = m.gae(rewards, values, mask, gamma=1.0, lam=1.0)
    to_come = torch.where(mask, rewards, 0).flip(1).cumsum(1).flip(1)
    assert torch.allclose(G, torch.where(mask, to_come, 0), atol=1e-12)
    assert torch.allclose(A, torch.where(mask, to_come - values, 0), atol=1e-12)


def test_shaped_rewards_by_hand(m):
    """k1 = .2 −.5 .2, β = .05, score 1 at the last real token: −.01 .025 .99; a second row of one token, then padding."""
    logps, ref_logps = f64(-1, -2, -0.5), f64(-1.2, -1.5, -0.7)
    logps, ref_logps = torch.stack([logps, f64(-1, 7, 7)]), torch.stack([ref_logps, f64(-1, 5, 5)])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    shaped = m.shape_rewards(f64(1, 2), logps.requires_grad_(), ref_logps, mask, beta=0.05)
    assert shaped[0].tolist() == pytest.approx([-0.01, 0.025, 0.99], abs=1e-12) and shaped[1].tolist() == [2, 0, 0]
    assert not shaped.requires_grad


def test_the_score_stands_at_the_last_real_token_after_a_prompt(m):
    mask = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 1]]).bool()
    zero = torch.zeros(3, 5, dtype=torch.float64)
    shaped = m.shape_rewards(f64(1, 2, 3), zero, zero, mask, beta=0.5)
    assert shaped.nonzero().tolist() == [[0, 3], [1, 1], [2, 4]] and shaped[shaped != 0].tolist() == [1, 2, 3]


def exact(prompt=1):
    """One prompt enumerated, and its token rewards under the policy itself."""
    e = Enumerated(prompt)
    return e, ppo.shape_rewards(e.rewards, e.logps, e.ref_logps, e.mask, beta=BETA)


def gradient_through(m, e, token_rewards, values, lam):
    """The expected gradient of policy_loss with advantages of gae, all completions weighed by π, as that of a sum over tokens."""
    advantages, _ = m.gae(token_rewards, values, e.mask, gamma=1.0, lam=lam)
    loss, _ = m.policy_loss(e.logps, e.logps.detach(), advantages * e.weights[:, None], e.mask, eps=0.2)
    return -e.gradient(loss) * float(e.mask.sum()) / len(e.law)  # the loss divides by the tokens, the expectation by nothing


def test_lambda_one_is_unbiased_for_any_values(m):
    """γ = λ = 1: Σ_y π(y)·∇L = −∇J exactly for V = 0 and for random V of prefixes (a function of the prefix, as a critic is)."""
    e, token_rewards = exact()
    token_rewards = m.shape_rewards(e.rewards, e.logps, e.ref_logps, e.mask, beta=BETA)
    generator = torch.Generator().manual_seed(0)
    worth = {y[:t]: float(torch.randn((), generator=generator)) for y in e.completions for t in range(len(y))}
    random = torch.tensor([[worth.get(y[:t], 0.0) if t < len(y) else 99.0 for t in range(e.mask.shape[1])] for y in e.completions])
    for values in (torch.zeros_like(token_rewards), random.double()):
        assert relative(gradient_through(m, e, token_rewards, values, 1.0), e.gradient(e.objective())) < 1e-12


def test_exact_values_make_every_lambda_unbiased(m):
    """With V(s) = E[what is still to come | s] the advantages of any λ average to the same; and V(root) = J."""
    e, token_rewards = exact()
    values = LANGUAGE.exact_values(e.law, token_rewards)
    assert values[0, 0].item() == pytest.approx(e.objective().item(), abs=1e-12)
    values = torch.where(e.mask, values, 99.0)  # nothing beyond the end may be looked at
    for lam in (1.0, 0.95, 0.5, 0.0):
        assert relative(gradient_through(m, e, token_rewards, values, lam), e.gradient(e.objective())) < 1e-12


def test_wrong_values_bias_it_for_lambda_below_one(m):
    """V = 0: the smaller λ, the more of the future is missing. The teeth of the two tests above."""
    e, token_rewards = exact()
    values = torch.zeros_like(token_rewards)
    errors = [relative(gradient_through(m, e, token_rewards, values, lam), e.gradient(e.objective())) for lam in (0.95, 0.5, 0.0)]
    assert 0.01 < errors[0] < errors[1] < errors[2]


def test_clip_by_hand(m):
    """One token, ε = .2: CLIP's values and slopes in ρ."""
    for advantage, table in CLIP.items():
        for ratio, value, slope in table:
            logps = f64(ratio).log()[None].requires_grad_()
            one = torch.ones(1, 1, dtype=torch.float64)
            loss, stats = m.policy_loss(logps, 0 * one, advantage * one, one.bool(), eps=0.2)
            loss.backward()
            assert -loss.item() == pytest.approx(value) and -logps.grad.item() / ratio == pytest.approx(slope)
            assert stats["clip_ratio/region_mean"].item() == (slope == 0)
            assert stats["approx_kl"].item() == pytest.approx(ratio - 1 - f64(ratio).log().item())


def test_penalty_by_hand(m):
    """One token, ρ = 1.5, A = 1, ε = .2, κ = 2: −1.2 + 2·(.5 − log 1.5) = −1.010930; its slope in log ρ is 2·(1.5 − 1) = 1, the clip has
    none. At ρ = 1 the penalty is 0 and has no slope."""
    for ratio, value, slope in ((1.5, -1.010930, 1.0), (1.0, -1.0, -1.0)):
        logps, one = f64(ratio).log()[None].requires_grad_(), torch.ones(1, 1, dtype=torch.float64)
        loss, _ = m.policy_loss(logps, 0 * one, one, one.bool(), eps=0.2, penalty=2.0)
        loss.backward()
        assert loss.item() == pytest.approx(value, abs=1e-6) and logps.grad.item() == pytest.approx(slope)


def test_the_penalty_is_the_kl_to_the_old_policy_in_value_and_gradient(m):
    """Over all completions of another policy: the mean over its tokens is KL(old‖π), its gradient that of the KL. KL(π‖old) is another."""
    e, old = Enumerated(prompt=1), Enumerated(prompt=1, seed=3)
    weights = old.law * len(old.law)
    logratio = torch.where(e.mask, e.logps - old.logps.detach(), 0)
    nothing = torch.zeros_like(e.logps)
    losses = [m.policy_loss(e.logps[[b]], old.logps[[b]], nothing[[b]], e.mask[[b]], eps=0.2, penalty=1.0)[0] * e.mask[b].sum()
              for b in range(len(weights))]
    penalty = (torch.stack(losses) * weights).mean()
    kl = -(old.law[:, None] * logratio).sum()
    assert penalty.item() == pytest.approx(kl.item(), abs=1e-12) and kl > 0.01
    assert relative(e.gradient(penalty), e.gradient(kl)) < 1e-12


def test_step_passes_the_penalty_on(m):
    """Far from the old log-probs the loss with a penalty is larger by κ times the k3 that it reports."""
    torch.manual_seed(0)
    policy, critic = GPT(GPTConfig.tiny(11)).double(), GPT(GPTConfig.tiny(11)).double().with_scalar_head()
    logps, old_logps, other, mask = random_rows()
    tokens = torch.randint(11, mask.shape)
    answers = Rollout(tokens, tokens, mask, old_logps, None, None, None, advantages=other, values=other, returns=logps)
    without, with_it = (m.step(policy, critic, answers, m.Config(), on_policy=False, penalty=penalty) for penalty in (0.0, 3.0))
    assert with_it[0].item() == pytest.approx((without[0] + 3 * without[2]["approx_kl"]).item()) and without[2]["approx_kl"] > 0.01


def test_the_penalty_adapts(small, monkeypatch):
    """Doubled above 1.5 times the target, halved below it by as much, else kept. In a run each step's κ follows from the one before, and a
    resumed run goes on with the κ that its checkpoint stored."""
    from minialign.kl import adapted

    assert [adapted(1.0, kl, 0.02) for kl in (0.0301, 0.0299, 0.0134, 0.0133, 0.0)] == [2.0, 1.0, 1.0, 0.5, 0.5]
    runs = []
    for save_every in (2, 4):
        module, cfg = small("ppo", steps=6, penalty=1.0, target_kl=1e-4, eps=1000.0, epochs=3, lr=1e-2, save_every=save_every)
        runs.append(module.main(cfg))
    logged = [row["penalty"] for row in read_rows(runs[0] / "metrics.jsonl")]
    steps = [after / before for before, after in zip(logged, logged[1:], strict=False)]
    assert logged[0] == 1.0 and set(steps) <= {0.5, 1.0, 2.0} and logged[-1] != 1.0
    go_back_to(runs[0], 4)
    module.main(module.Config(resume=str(runs[0])))
    assert [row["penalty"] for row in read_rows(runs[0] / "metrics.jsonl")] == logged
    assert result_of(runs[0]) == result_of(runs[1])
    with monkeypatch.context() as patch:  # an update that is refused has moved nothing: no reason to halve κ
        patch.setattr(run.Run, "may_update", lambda *_: False)
        module, cfg = small("ppo", steps=3, penalty=1.0, target_kl=0.01)
        assert [row["penalty"] for row in read_rows(module.main(cfg) / "metrics.jsonl")] == [1.0] * 3
    module, cfg = small("ppo", target_kl=0.1)
    with pytest.raises(BadInput, match="--target_kl 0.1: needs a --penalty above 0"):
        module.main(cfg)


def test_texts_beside_the_rollout(small, tmp_path):
    """The first update's gradient with --ptx is that without, plus ptx times the gradient of the mean −log π per token of the step's rows.
    Read off AdamW's first moment: after one step it is .1 times the gradient (no norm is clipped). In micro-batches and at once."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("ask for tea", "i want salt, please.", "rope", "ink and tea")))
    settings = dict(steps=1, epochs=1, held_out=0.0, max_grad_norm=1e9, save_every=1, tau=0.7, text=str(path))
    moments = []
    for changes in ({}, {"ptx": 0.5}, {"ptx": 0.5, "micro_batch": 3}):
        module, cfg = small("ppo", **settings, **changes)
        folder = module.main(cfg)
        stored = load_file(folder / "checkpoints/step_000001/optim.safetensors")
        moments.append({name: tensor for name, tensor in stored.items() if name.startswith("optimizer.") and name.endswith("exp_avg")})
    policy, tokenizer = load_pretrained(cfg.policy), load_tokenizer(cfg.policy)
    rows = encode_texts(tokenizer, [json.loads(line)["text"] for line in path.read_text().splitlines()], max_len=128)
    picked = batch_rows(len(rows), cfg.batch_size, 0, derive_seed("texts", cfg.seed))
    nll, tokens = 0.0, 0
    for i in picked:
        x, y = rows[i]
        logits = (policy(torch.tensor([(x + y)[:-1]]))[0] / 0.7).log_softmax(-1)  # every log-prob of a run is at its temperature
        nll, tokens = nll - sum(logits[len(x) - 1 + t, token] for t, token in enumerate(y)), tokens + len(y)
    gradients = torch.autograd.grad(0.5 * nll / tokens, list(policy.parameters()))
    for alike in moments[1:]:
        ordered = sorted(moments[0].items(), key=lambda item: int(item[0].split(".")[1]))
        for (name, without), gradient in zip(ordered, gradients, strict=True):
            assert torch.allclose(alike[name], without + 0.1 * gradient, atol=1e-10)


def test_value_clip_by_hand(m):
    """V = 1, V_old = .5, G = 2, ε = .2: max((1 − 2)², (.7 − 2)²)/2 = .845. Inside the clip: V = .6: ½·1.4² = .98."""
    one = torch.ones(1, 1, dtype=torch.float64)
    loss, stats = m.value_loss(one, 0.5 * one, 2 * one, one.bool(), eps=0.2)
    assert loss.item() == pytest.approx(0.845) and stats["value_clip_ratio"].item() == 1
    loss, stats = m.value_loss(0.6 * one, 0.5 * one, 2 * one, one.bool(), eps=0.2)
    assert loss.item() == pytest.approx(0.98) and stats["value_clip_ratio"].item() == 0


def test_gradients_by_finite_differences(m):
    logps, old_logps, other, mask = random_rows()
    assert gradcheck(lambda x: m.policy_loss(x, old_logps, other, mask, eps=0.2)[0], logps.clone().requires_grad_())
    assert gradcheck(lambda x: m.value_loss(x, old_logps, other, mask, eps=0.2)[0], logps.clone().requires_grad_())


def test_only_the_present_policy_and_values_are_differentiated(m):
    logps, old_logps, other, mask = (x.clone().requires_grad_() if x.is_floating_point() else x for x in random_rows())
    m.policy_loss(logps, old_logps, other, mask, eps=0.2)[0].backward()
    m.value_loss(logps, old_logps, other, mask, eps=0.2)[0].backward()
    assert logps.grad.abs().sum() > 0 and old_logps.grad is None and other.grad is None
    advantages, returns = m.gae(random_rows()[0], logps, mask, gamma=1.0, lam=0.9)
    assert not advantages.requires_grad and not returns.requires_grad


def test_whitening_by_hand_and_over_real_tokens_only():
    """A = .635 .665 .7 with the population variance: −1.192158 −.062745 1.254903; padding neither counts nor changes."""
    A, mask = f64(0.635, 0.665, 0.7)[None], torch.ones(1, 3).bool()
    for x, where in ((A, mask), padded(A, mask, value=1e6)):
        assert whiten(x, where)[where].tolist() == pytest.approx([-1.192158, -0.062745, 1.254903], abs=1e-4)
        assert not whiten(x, where)[~where].any()


def test_padding_and_order_do_not_matter(m):
    logps, old_logps, other, mask = random_rows()
    order = torch.randperm(len(mask), generator=torch.Generator().manual_seed(2))
    wide = padded(logps, old_logps, other, mask)
    wide[1][:, logps.shape[1] :] = -5.0
    for loss in (m.policy_loss, m.value_loss):
        expected = loss(logps, old_logps, other, mask, eps=0.2)[0]
        assert torch.allclose(loss(*wide, eps=0.2)[0], expected, atol=1e-14)
        assert torch.allclose(loss(logps[order], old_logps[order], other[order], mask[order], eps=0.2)[0], expected, atol=1e-14)
    A, G = m.gae(logps, old_logps, mask, gamma=0.9, lam=0.8)
    wide_A, wide_G = m.gae(wide[0], wide[1], wide[3], gamma=0.9, lam=0.8)
    assert torch.allclose(wide_A[:, : A.shape[1]], A, atol=1e-14) and torch.allclose(wide_G[:, : G.shape[1]], G, atol=1e-14)
    assert not wide_A[:, A.shape[1] :].any()


def test_explained_variance(m):
    """Perfect values 1, their mean everywhere 0, and the opposite of perfect below 0."""
    returns, mask = f64(1, 2, 3, 6)[None], torch.ones(1, 4).bool()
    assert m.explained_variance(returns, returns, mask).item() == 1
    assert m.explained_variance(torch.full_like(returns, 3.0), returns, mask).item() == pytest.approx(0)
    assert m.explained_variance(-returns, returns, mask).item() < -1
    assert m.explained_variance(returns, torch.full_like(returns, 3.0), mask) is None


def test_missing_eos_is_subtracted(small, monkeypatch):
    """max_new = 3 with a policy that hardly ever stops: the mean of what reaches shape_rewards is lower by missing_eos × unfinished."""
    seen = []
    original = ppo.shape_rewards
    monkeypatch.setattr(ppo, "shape_rewards", lambda scores, *a, **k: seen.append(scores) or original(scores, *a, **k))
    for penalty in (0.0, 2.0):
        module, cfg = small("ppo", max_new=3, steps=1, missing_eos=penalty)
        module.main(cfg)
    difference = (seen[0] - seen[1]).round(decimals=5).tolist()
    assert set(difference) <= {0.0, 2.0} and difference.count(2.0) >= 4


def test_value_model_from_a_reward_model(small, tmp_path):
    """--value FOLDER starts the critic at a reward model; a language model there is refused, in one sentence."""
    module, cfg = small("reward_model", steps=2)
    reward_model = module.main(cfg) / "final"
    module, cfg = small("ppo", steps=2, value=str(reward_model))
    module.main(cfg)
    module, cfg = small("ppo", steps=2, value=cfg.policy)
    with pytest.raises(BadInput, match="--value .*expected a reward model"):
        module.main(cfg)


def test_with_lora_the_critic_of_value_trains_adapters_too(small, monkeypatch):
    module, cfg = small("reward_model", steps=1)
    reward_model = module.main(cfg) / "final"
    seen = []
    monkeypatch.setattr(ppo, "first_rollout", lambda run, *_: seen.append(run.modules["value_model"]))
    module, cfg = small("ppo", steps=1, value=str(reward_model), lora=2)
    module.main(cfg)
    trained = {name for name, p in seen[0].named_parameters() if p.grad is not None}
    assert len(trained) > 20 and all(name.endswith(("lora_A", "lora_B")) or name == "head.weight" for name in trained)


def test_values_and_returns_of_a_bfloat16_model_are_float32(m):
    """Values near 5, from the bfloat16 trunk's own hidden states: values, returns, advantages and critic loss are those of float64 to 1e-5.
    In bfloat16 each value near 5 would be off by up to 1/64."""
    torch.manual_seed(0)
    critic = GPT(GPTConfig.tiny(40)).bfloat16().with_scalar_head()
    torch.nn.init.constant_(critic.head_weight, 0.02)
    critic.config.reward_offset = -5.0
    tokens, mask = torch.randint(40, (6, 12)), torch.ones(6, 12, dtype=torch.bool)
    with torch.no_grad():
        exact = critic.hidden(tokens).double() @ critic.head_weight.double()[0] + 5.0
        answers = Rollout(tokens, tokens, mask, -torch.rand(6, 12), None, None, None, ref_logps=-torch.rand(6, 12), values=critic(tokens))
    wanted = Rollout(tokens, tokens, mask, answers.old_logps.double(), None, None, None, answers.ref_logps.double(), values=exact)
    rewards = torch.randn(6)
    for rollout, r in ((answers, rewards), (wanted, rewards.double())):
        m.credit(rollout, r, m.Config())
    loss, _ = m.value_loss(answers.values + 0.01, answers.values, answers.returns, mask, eps=0.2)
    exact_loss, _ = m.value_loss(exact + 0.01, exact, wanted.returns, mask, eps=0.2)
    pairs = [(answers.values, exact), (loss, exact_loss)] + [(getattr(answers, n), getattr(wanted, n)) for n in ("returns", "advantages")]
    assert all(found.dtype == torch.float32 and (found - right).abs().max() < 1e-5 for found, right in pairs)


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed"])
@pytest.mark.parametrize("method", ["ppo", "rft", "irl"])
def test_a_run_computes_rewards_values_and_advantages_in_float32(small, monkeypatch, method, dtype):
    """Wherever ppo's step is used, and what rft and irl learn as a reward: float32 numbers, which bfloat16 would round."""
    seen, real = [], ppo.credit

    def credit(answers, rewards, cfg):
        real(answers, rewards, cfg)
        seen.append([rewards, answers.values, answers.advantages, answers.returns])

    monkeypatch.setattr(ppo, "credit", credit)
    module, cfg = small(method, dtype=dtype, steps=2, **({} if method == "ppo" else {"policy_step": "ppo"}))
    module.main(cfg)
    assert seen and all(x.dtype == torch.float32 and (x != x.bfloat16()).any() for x in seen[-1])


def test_a_value_within_eps_is_not_clipped_by_rounding():
    """1000 old and new values within ±.1, eps .2: old + (value − old) is off by a unit of the last place here and there."""
    old, values, returns = torch.rand(3, 1, 1000, generator=torch.Generator().manual_seed(0)) * 0.2 - 0.1
    assert ((old + (values - old) - returns) ** 2 > (values - returns) ** 2).any()  # what must not be counted
    assert ppo.value_loss(values, old, returns, torch.ones(1, 1000).bool(), eps=0.2)[1]["value_clip_ratio"] == 0
