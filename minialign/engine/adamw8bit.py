"""torchao's AdamW with moments of one byte a number (Dettmers et al. 2022, arXiv:2110.02861), in the form that a run needs.

torchao keeps the learning rate as a tensor, and its moments as tensors of a class of its own. A run sets the learning rate as a number,
and its checkpoints hold plain tensors. torchao is imported only when this optimizer is used.

Checked by tests/engine/test_opening.py.
"""

import torch


def adamw8bit(parameters, *, lr, betas, weight_decay):
    """The optimizer. bfloat16 weights are rounded at random, so that steps below their precision count on average."""
    from torchao.optim import AdamW8bit

    class Storable(AdamW8bit):
        def step(self, closure=None):
            rates = [group["lr"] for group in self.param_groups]
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = torch.as_tensor(rate, dtype=torch.float32)  # a tensor, so that a new rate needs no new code
            try:
                return super().step(closure)
            finally:
                for group, rate in zip(self.param_groups, rates, strict=True):
                    group["lr"] = rate

        def state_dict(self):
            """Like any optimizer's, but a moment in bytes is two plain tensors: exp_avg.codes (bytes) and exp_avg.scale (float32)."""
            packed = super().state_dict()
            for index, state in packed["state"].items():
                plain = {}
                for name, value in state.items():
                    in_bytes = hasattr(value, "codes")
                    plain |= {f"{name}.codes": value.codes, f"{name}.scale": value.scale} if in_bytes else {name: value}
                packed["state"][index] = plain
            return packed

        def load_state_dict(self, packed):
            """Restore what state_dict gave. The tensors may have another dtype that holds the same numbers."""
            parameters = [p for group in self.param_groups for p in group["params"]]
            for group, stored in zip(self.param_groups, packed["param_groups"], strict=True):
                group |= {name: value for name, value in stored.items() if name != "params"}
            for index, stored in packed["state"].items():
                p, state = parameters[index], {"step": stored["step"].cpu()}
                for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
                    state[name] = self._new_buffer(p, signed)
                    for part in ("codes", "scale") if hasattr(state[name], "codes") else ():
                        getattr(state[name], part).copy_(stored[f"{name}.{part}"])
                    if name in stored:
                        state[name].copy_(stored[name])
                self.state[p] = state

    optimizer = Storable(parameters, lr=lr, betas=betas, weight_decay=weight_decay, bf16_stochastic_round=True)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return optimizer
