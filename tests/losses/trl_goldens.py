"""Makes trl_goldens.json: TRL 1.16's own losses and gradients on small tensors, in float64.

    pip install trl==1.16.0 && python tests/losses/trl_goldens.py

`GRPOTrainer._compute_loss` runs as it is, on a stand-in for the trainer whose model returns given log-probabilities.
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from trl import GRPOTrainer

B, S = 6, 5
NONE = {"loss_type": "grpo", "level": "token", "low": 0.2, "high": 0.2, "beta": 0.0, "weighted": False, "off": None}
CASES = {
    "grpo": {**NONE, "beta": 0.1},
    "dapo": {**NONE, "loss_type": "dapo", "high": 0.28},
    "dr_grpo": {**NONE, "loss_type": "dr_grpo"},
    "gspo": {**NONE, "level": "sequence", "low": 0.03, "high": 0.04},
    "cispo": {**NONE, "loss_type": "cispo", "high": 1.3},
    "k3_weighted": {**NONE, "beta": 0.1, "weighted": True},
    "off_policy_mask": {**NONE, "beta": 0.1, "off": 0.1},
}


def tensors():
    rng = np.random.default_rng(0)
    logprobs_BS = -rng.exponential(size=(B, S))
    lengths_B = np.array([5, 3, 1, 4, 5, 2])
    return {
        "logprobs_BS": logprobs_BS,
        "old_logprobs_BS": logprobs_BS + rng.normal(size=(B, S), scale=0.4),
        "ref_logprobs_BS": logprobs_BS + rng.normal(size=(B, S), scale=0.4),
        "advantages_B": rng.normal(size=B),
        "mask_BS": np.arange(S) < lengths_B[:, None],
    }


def trainer(case):
    metrics = {"eval": defaultdict(list)}
    return SimpleNamespace(
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=case["off"],
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        importance_sampling_level=case["level"],
        beta=case["beta"],
        loss_type=case["loss_type"],
        epsilon_low=case["low"],
        epsilon_high=case["high"],
        args=SimpleNamespace(use_bias_correction_kl=case["weighted"], delta=None, steps_per_generation=1),
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        model=SimpleNamespace(training=False),
        max_completion_length=S,
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        _entropy_bonus_enabled=False,
        _metrics=metrics,
    )


def run(case):
    data = {name: torch.from_numpy(np.asarray(value)) for name, value in tensors().items()}
    logprobs = data["logprobs_BS"].clone().requires_grad_()
    mask = data["mask_BS"].long()
    this = trainer(case)
    this._get_per_token_logps_and_entropies = lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None)
    loss = GRPOTrainer._compute_loss(
        this,
        None,
        {
            "prompt_ids": mask[:, :1],
            "prompt_mask": mask[:, :1],
            "completion_ids": mask,
            "completion_mask": mask,
            "advantages": data["advantages_B"],
            "old_per_token_logps": data["old_logprobs_BS"],
            "ref_per_token_logps": data["ref_logprobs_BS"],
            "num_items_in_batch": mask.sum(),
        },
    )
    loss.backward()
    metrics = {name: values[-1] for name, values in this._metrics["eval"].items() if name in ("kl",)}
    return {"loss": loss.item(), "gradient_BS": logprobs.grad.tolist(), **metrics}


if __name__ == "__main__":
    goldens = {
        "tensors": {name: value.tolist() for name, value in tensors().items()},
        "cases": {name: {"trl": case, **run(case)} for name, case in CASES.items()},
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(goldens) + "\n")
