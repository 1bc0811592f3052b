"""The bill of DeepSeek-V3 beside those of dense models: published where it is, computed by one rule for all.

"DeepSeek Inside" (M. A. Cusumano, Communications of the ACM, 2025) sets V3's $5.6 million against the cost of models
such as GPT-4. Of GPT-4 nothing is published; what is said of it is labelled a rumour here, and the widespread one is of
a mixture of experts, not of the dense model that the column's figures suggest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_jax.analysis import cost
from moe_jax.analysis.flops import parameter_counts, training_flops_per_token
from moe_jax.analysis.tables import markdown
from moe_jax.presets import get

DOLLARS_PER_HOUR = 2.0
"""Of every GPU, as DeepSeek-V3's report assumes of an H800: so that the bills differ by hours alone."""


@dataclass(frozen=True)
class Training:
    name: str
    chip: str
    tokens: float
    mfu: float
    """Model FLOPs utilisation that the hours are computed with."""
    mfu_source: str
    preset: str = ""
    """A named model; without it 6 FLOPs per parameter and token, no attention."""
    parameters: float = 0.0
    extra_chip_hours: float = 0.0
    published_hours: float | None = None
    published_source: str = ""
    rumour: str = ""
    """What of it is not published, and where it is said."""


TRAININGS = (
    Training(
        "DeepSeek-V3, sparse",
        "h800",
        14.8e12,
        0.3894,
        "measured, arXiv:2505.09343, table 4",
        preset="deepseek_v3",
        extra_chip_hours=124e3,
        published_hours=2.788e6,
        published_source="arXiv:2412.19437, table 1",
    ),
    Training(
        "Llama 3.1 405B, dense",
        "h100",
        15.6e12,
        0.40,
        "about, arXiv:2407.21783",
        preset="llama_3_1_405b",
        published_hours=30.84e6,
        published_source="its model card",
    ),
    Training(
        "dense, of GPT-4's rumoured size",
        "h100",
        13e12,
        0.40,
        "assumed, Llama's",
        parameters=1.8e12,
        rumour="1.8 T parameters and 13 T tokens are a leak that OpenAI never confirmed. The leak is of 16 experts of"
        " which a token uses 2, on about 25,000 A100 for 90 to 100 days, about $63 M at $1 an hour; that GPT-4 is dense"
        " is not even rumoured there. This row is what a dense model of that size would take.",
    ),
)


def bills() -> list[dict[str, Any]]:
    """For each training: parameters, FLOPs, and hours, dollars and energy computed and published."""
    found = []
    for training in TRAININGS:
        chip = cost.CHIPS[training.chip]
        if training.preset:
            cfg = get(training.preset)
            counts = parameter_counts(cfg)
            total, active, per_token = counts.total, counts.active, training_flops_per_token(cfg, 4096)
        else:
            total = active = training.parameters
            per_token = 6 * total
        bill = cost.bill(
            training.tokens,
            training.mfu * chip.flops / per_token,
            1,
            DOLLARS_PER_HOUR,
            extra_chip_hours=training.extra_chip_hours,
            watts=chip.watts,
        )
        published = training.published_hours
        found.append(
            {
                "name": training.name,
                "rumour": training.rumour,
                "parameters_total": total,
                "parameters_active": active,
                "tokens": training.tokens,
                "training_flops_per_token": per_token,
                "training_flops": per_token * training.tokens,
                "chip": training.chip,
                "mfu": training.mfu,
                "mfu_source": training.mfu_source,
                "chip_hours": bill.chip_hours,
                "dollars": bill.dollars,
                "kilowatt_hours": bill.kilowatt_hours,
                "published_chip_hours": published,
                "published_dollars": None if published is None else published * DOLLARS_PER_HOUR,
                "published_source": training.published_source,
            }
        )
    return found


def comparison() -> str:
    """The bills as Markdown, with what is rumour and what is assumed."""
    rows = [
        [
            "training",
            "params (active)",
            "tokens",
            "FLOPs",
            "GPU hours, computed",
            "published",
            "at $2 an hour, computed",
            "published hours",
            "GWh",
        ]
    ]
    found = bills()
    for row in found:
        hours, dollars = row["published_chip_hours"], row["published_dollars"]
        rows.append(
            [
                f"{row['name']}{' (RUMOUR)' if row['rumour'] else ''}",
                f"{row['parameters_total'] / 1e9:,.0f} B ({row['parameters_active'] / 1e9:,.0f} B)",
                f"{row['tokens'] / 1e12:.1f} T",
                f"{row['training_flops']:.2e}",
                f"{row['chip_hours'] / 1e6:.2f} M {row['chip'].upper()}",
                "–" if hours is None else f"{hours / 1e6:.2f} M",
                f"${row['dollars'] / 1e6:,.1f} M",
                "–" if dollars is None else f"${dollars / 1e6:,.1f} M",
                f"{row['kilowatt_hours'] / 1e6:.3g}",
            ]
        )
    reference = found[0]
    times = ", ".join(
        f"{row['name']} {row['training_flops_per_token'] / reference['training_flops_per_token']:.1f} times"
        for row in found[1:]
    )
    rules = "; ".join(f"{row['name']}: MFU {row['mfu']:.1%} ({row['mfu_source']})" for row in found)
    sources = "; ".join(f"{row['name']}: {row['published_source']}" for row in found if row["published_source"])
    rumours = "\n".join(f"Rumour: {row['name']}: {row['rumour']}" for row in found if row["rumour"])
    return (
        f"{markdown(rows)}\n\nFLOPs per token against {reference['name']}: {times}.\n"
        f"Computed from {rules}; context extension and post-training are in DeepSeek-V3's row. Published: {sources}."
        " Dollars are rent of GPUs at one price for all; research, ablations, data and people are in none. GWh:"
        f" computed hours at the GPUs' thermal design power, without hosts, network and cooling.\n{rumours}"
    )
