"""How a model routes a text: from weights and documents to tables and plots (`python -m moe_jax inspect-routing`).

R rows, B rows of a batch, S sequence, T tokens that count, L sparse layers (the multi-token prediction modules' are not
among them), E experts, K experts per token, X different token ids, F texts.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from moe_jax.analysis import routing, routing_plots
from moe_jax.data import DataError
from moe_jax.data.packing import pack
from moe_jax.data.text import TextCorpus
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.losses.balance import load_entropy, max_violation
from moe_jax.model.definition import Arrays, Definition

_PIECE_CHARACTERS = 2048
"""Documents are cut into pieces of this length and the pieces shuffled, so that a few tokens come of many documents."""
_BATCH_TOKENS = 4096
_FEWEST_OCCURRENCES = 10
"""A token that is rarer is in no list: its experts say little."""
_FEWEST_EXPECTED = 5
"""A pair of experts that chance would bring together in fewer tokens is in no list."""
_LISTED_PAIRS, _LISTED_TOKENS = 50, 20
"""Per layer, and per expert, in the CSV files."""
_PRINTED_PAIRS, _PRINTED_TOKENS, _PRINTED_EXPERTS = 3, 8, 8
"""Per layer, expert and layer, of a few layers; the CSV files have more."""
_PLOTTED_TOKENS = 32
_OPTIONAL_FILES = ("coactivation_between_layers.png", "texts.png", "texts.csv", "saturation.png", "saturation.csv")


@dataclass(frozen=True)
class Text:
    """Documents of one kind."""

    name: str
    documents: Sequence[str]


@dataclass(frozen=True)
class Rows:
    """Texts as packed tokens."""

    batch: dict[str, np.ndarray]
    """int32 [R, S] each: tokens_BS, segment_ids_BS, positions_BS."""
    counted_RS: np.ndarray
    """bool: neither padding nor a special token."""
    text_R: np.ndarray
    """Which text a row is of."""
    names: Sequence[str]
    """The texts' names, [F]."""

    @property
    def tokens_T(self) -> np.ndarray:
        return self.batch["tokens_BS"][self.counted_RS]

    @property
    def texts_T(self) -> np.ndarray:
        return np.broadcast_to(self.text_R[:, None], self.counted_RS.shape)[self.counted_RS]


@dataclass(frozen=True)
class Routing:
    """What one checkpoint does with the rows."""

    step: int
    experts_LTK: np.ndarray
    """uint16: 2·L·K bytes for a token, the one thing here that grows with the text."""
    score_entropy_L: np.ndarray
    """Mean over tokens of the entropy of the scores, normalised over experts; nats. Special tokens are in it."""
    confidence_L: np.ndarray
    """Mean over tokens of the largest of the normalised scores. Special tokens are in it."""


def read_text(path: Path) -> Text:
    """A file, or a folder of .txt and .jsonl files, all of it.

    Raises:
        DataError: no such path, or it is not UTF-8 text, or has none.
    """
    if path.is_dir() or path.suffix == ".jsonl":
        corpus = TextCorpus.load(path)
        return Text(path.name, [*corpus.train, *corpus.validation])
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: give a text file, a .jsonl file, or a folder of such files") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}): convert it, or give a text file") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not text.strip():
        raise DataError(f"{path} is empty: give a file with text")
    return Text(path.name, [text])


def pack_texts(texts: Sequence[Text], tokenizer: Tokenizer, sequence_length: int, num_tokens: int) -> Rows:
    """About `num_tokens` tokens, the same number of each text as far as it has them, in rows of `sequence_length`.

    A document's start has the beginning-of-sequence token, as in training.

    Raises:
        DataError: a text has no token that counts.
    """
    parts: list[dict[str, np.ndarray]] = []
    text_R: list[int] = []
    for index, text in enumerate(texts):
        pieces = [
            (document[start : start + _PIECE_CHARACTERS], start == 0)
            for document in text.documents
            for start in range(0, len(document), _PIECE_CHARACTERS)
        ]
        documents, room = [], math.ceil(num_tokens / len(texts))
        for place in np.random.default_rng(0).permutation(len(pieces)):
            piece, is_start = pieces[place]
            ids = tokenizer.encode(piece)[:room]
            room -= len(ids)
            start = [tokenizer.bos_id] if is_start and tokenizer.bos_id is not None else []
            documents.append(start + ids)
            if not room:
                break
        packed = pack(documents, sequence_length, pad_id=tokenizer.pad_id, split_long=True).batch
        valid_RS = packed["segment_ids_BS"] > 0
        if not np.any(valid_RS & ~tokenizer.is_special_V[packed["tokens_BS"]]):
            raise DataError(f"{text.name}: no token but special ones: give more text")
        parts.append(packed)
        text_R += [index] * len(valid_RS)
    batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    counted_RS = (batch["segment_ids_BS"] > 0) & ~tokenizer.is_special_V[batch["tokens_BS"]]
    return Rows(batch, counted_RS, np.array(text_R), [text.name for text in texts])


def make_routing(definition: Definition, rows: Rows) -> Callable[[int, Arrays, Arrays], Routing]:
    """A function (step, params, rest) → Routing of the rows, in batches of one shape, compiled once."""
    R, S = rows.counted_RS.shape
    B = min(R, max(1, _BATCH_TOKENS // S))

    @jax.jit
    def choices(params: Arrays, rest: Arrays, batch: dict[str, Array]) -> tuple[Array, Array]:
        model = definition.merge(params, rest)
        stats = model(
            batch["tokens_BS"], segment_ids_BS=batch["segment_ids_BS"], positions_BS=batch["positions_BS"]
        ).router
        assert stats is not None
        sums = (stats.tokens_B, stats.entropy_B, stats.confidence_B)
        return stats.experts_BSK.astype(jnp.uint16), jnp.stack([jnp.sum(x_LB, axis=1) for x_LB in sums])

    def apply(step: int, params: Arrays, rest: Arrays) -> Routing:
        experts, sums_3L = [], np.zeros((3, definition.cfg.num_moe_layers))
        for start in tqdm(range(0, R, B), desc=f"step {step}", unit="batch", delay=3, leave=False):
            part = slice(start, start + B)
            missing = start + B - min(start + B, R)
            # Rows without a segment are padding.
            batch = {name: np.pad(array[part], ((0, missing), (0, 0))) for name, array in rows.batch.items()}
            experts_LBSK, part_3L = jax.device_get(choices(params, rest, batch))
            experts.append(experts_LBSK[:, : B - missing][:, rows.counted_RS[part]])
            sums_3L += part_3L
        tokens_L, entropy_L, confidence_L = sums_3L
        return Routing(step, np.concatenate(experts, axis=1), entropy_L / tokens_L, confidence_L / tokens_L)

    return apply


@dataclass(frozen=True)
class Layer:
    """What one sparse layer does with the text."""

    figures: dict[str, float]
    """The row of layers.csv."""
    counts_E: np.ndarray
    pairs_EE: np.ndarray
    """Tokens that use both experts."""
    expected_EE: np.ndarray
    """The same if the experts were chosen independently."""
    text_counts_FE: np.ndarray
    tokens: list[dict[str, Any]]
    """The rows of vocabulary.csv."""
    frequent_share_XE: np.ndarray
    """Vocabulary specialisation of the most frequent tokens."""


def inspect_layer(found: Routing, layer: int, rows: Rows, tokenizer: Tokenizer, num_experts: int) -> Layer:
    """All measures of one layer, counted from 0."""
    experts_TK = found.experts_LTK[layer]
    K = experts_TK.shape[1]
    counts_E = routing.expert_counts(experts_TK, num_experts)
    ids_X, kinds_T, occurrences_X = np.unique(rows.tokens_T, return_inverse=True, return_counts=True)
    counts_XE = routing.kind_counts(kinds_T, experts_TK, len(ids_X), num_experts)
    chance_XE = routing.kind_counts(routing.shuffled(kinds_T), experts_TK, len(ids_X), num_experts)
    share_XE = routing.specialisation(counts_XE)
    by_chance = routing.mutual_information(chance_XE)
    figures = {
        "layer": layer + 1,
        "max_violation": float(max_violation(jnp.asarray(counts_E))),
        "load_entropy": float(load_entropy(jnp.asarray(counts_E))),
        "dead_experts": int(np.sum(counts_E == 0)),
        "score_entropy": float(found.score_entropy_L[layer]),
        "confidence": float(found.confidence_L[layer]),
        "max_share": routing.mean_max_specialisation(counts_XE),
        "max_share_shuffled": routing.mean_max_specialisation(chance_XE),
        "mutual_information": routing.mutual_information(counts_XE) - by_chance,
        "mutual_information_shuffled": by_chance,
    }
    average_E = counts_E / np.sum(counts_E)
    common_X = np.flatnonzero(occurrences_X >= _FEWEST_OCCURRENCES)
    tokens = []
    for expert in range(num_experts):
        # Ties (shares of 1/K) go to the more frequent token.
        order = common_X[np.lexsort((-occurrences_X[common_X], -share_XE[common_X, expert]))]
        above = [x for x in order[:_LISTED_TOKENS] if share_XE[x, expert] > average_E[expert]]
        for rank, x in enumerate(above, 1):
            tokens.append(
                {
                    "layer": layer + 1,
                    "expert": expert,
                    "rank": rank,
                    "token_id": int(ids_X[x]),
                    "token": readable(tokenizer, int(ids_X[x])),
                    "occurrences": int(occurrences_X[x]),
                    "share_of_routings": float(share_XE[x, expert]),
                    "share_of_occurrences": float(share_XE[x, expert] * K),
                    "average_share_of_routings": float(average_E[expert]),
                }
            )
    return Layer(
        figures,
        counts_E,
        routing.pair_counts(experts_TK, num_experts),
        routing.independent_pairs(counts_E, K),
        routing.kind_counts(rows.texts_T, experts_TK, len(rows.names), num_experts),
        tokens,
        share_XE[np.argsort(-occurrences_X, kind="stable")[:_PLOTTED_TOKENS]],
    )


def readable(tokenizer: Tokenizer, token: int, ascii_only: bool = False) -> str:
    """A token's text in quotes, with escapes for what cannot be seen; bytes that are no text as \\x…"""
    text = tokenizer.token_strings_V[token].decode("utf-8", errors="backslashreplace")
    quoted = (ascii if ascii_only else repr)(text)
    return quoted.replace("\\\\x", "\\x")


def write_report(
    folder: Path,
    title: dict[str, Any],
    rows: Rows,
    found: Routing,
    earlier: Iterable[Routing],
    tokenizer: Tokenizer,
    num_experts: int,
) -> str:
    """Writes the plots, CSV files and summary.json to `folder`, and returns the tables to print.

    Args:
        title: what was inspected, for summary.json.
        found: the routing of the newest checkpoint.
        earlier: that of older ones, oldest first.

    Raises:
        OSError: the folder cannot be written.
    """
    K, T = found.experts_LTK.shape[2], found.experts_LTK.shape[1]
    layers = [
        inspect_layer(found, layer, rows, tokenizer, num_experts)
        for layer in tqdm(range(len(found.experts_LTK)), desc="measures", unit="layer", delay=3, leave=False)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for name in _OPTIONAL_FILES:
        (folder / name).unlink(missing_ok=True)

    text = [_layer_table(layers, num_experts, K)]
    _write_load(folder, layers, num_experts)
    text.append(_write_coactivation(folder, layers, found, T))
    text.append(_write_vocabulary(folder, layers, rows, tokenizer, K))
    if len(rows.names) > 1:
        text.append(_write_texts(folder, layers, rows, K))
    curves, saturation_text = _write_saturation(folder, layers, found, earlier, K)
    text.append(saturation_text)
    summary = {
        **title,
        "step": found.step,
        "tokens": T,
        "experts": num_experts,
        "experts_per_token": K,
        "texts": list(rows.names),
        "layers": [layer.figures for layer in layers],
        "saturation": curves,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return "\n\n".join(text)


def _layer_table(layers: Sequence[Layer], num_experts: int, K: int) -> str:
    lines = [
        [
            str(f["layer"]),
            f"{f['max_violation']:.3f}",
            f"{f['load_entropy']:.3f}",
            str(f["dead_experts"]),
            f"{f['score_entropy']:.3f}",
            f"{f['confidence']:.3f}",
            f"{f['max_share']:.3f} ({f['max_share_shuffled']:.3f})",
            f"{f['mutual_information']:.3f} ({f['mutual_information_shuffled']:.3f})",
        ]
        for f in (layer.figures for layer in layers)
    ]
    head = ["layer", "MaxVio", "load entropy", "dead", "score entropy", "confidence", "max share", "token-expert info"]
    return (
        f"Load, scores and specialisation ({num_experts} experts, {K} per token; even load: entropy"
        f" {math.log(num_experts):.3f} nats)\n"
        + _table(head, lines)
        + "\nmax share: the largest share of a token's routings to one expert, on average; even"
        f" {1 / num_experts:.3f}, at most {1 / K:.3f}; in brackets by chance, with shuffled tokens.\n"
        "token-expert info: mutual information in nats above chance, at most"
        f" {math.log(num_experts / K):.3f}; in brackets chance, the bias of a small sample."
    )


def _write_load(folder: Path, layers: Sequence[Layer], num_experts: int) -> None:
    _write_csv(folder / "layers.csv", [layer.figures for layer in layers])
    shares_LE = [layer.counts_E / np.sum(layer.counts_E) for layer in layers]
    load = [
        {"layer": index, "expert": expert, "assignments": int(layer.counts_E[expert]), "share": float(share_E[expert])}
        for index, (layer, share_E) in enumerate(zip(layers, shares_LE, strict=True), 1)
        for expert in range(num_experts)
    ]
    _write_csv(folder / "load.csv", load)
    notes = [
        f"MaxVio {f['max_violation']:.2f}, entropy {f['load_entropy']:.2f} of {math.log(num_experts):.2f} nats,"
        f" {f['dead_experts']} without a token"
        for f in (layer.figures for layer in layers)
    ]
    routing_plots.plot_load(folder / "load.png", shares_LE, notes)


def _write_coactivation(folder: Path, layers: Sequence[Layer], found: Routing, num_tokens: int) -> str:
    listed: list[dict[str, Any]] = []
    shares, ratios, between_shares, between_ratios = [], [], [], []
    for index, layer in enumerate(layers):
        share_EE = routing.coactivation(layer.pairs_EE, layer.counts_E)
        np.fill_diagonal(share_EE, np.nan)
        ratio_EE = _ratio(layer.pairs_EE, layer.expected_EE)
        np.fill_diagonal(ratio_EE, np.nan)
        shares.append(share_EE)
        ratios.append(ratio_EE)
        above = np.triu(np.ones_like(layer.pairs_EE, bool), 1)
        pairs = _pair_rows(layer.pairs_EE, layer.expected_EE, above, layer.counts_E, layer.counts_E)
        listed += [{"layer": index + 1, "next_layer": index + 1, **pair} for pair in pairs]
    for index, (layer, after) in enumerate(pairwise(layers)):
        pairs_EE = routing.pair_counts(found.experts_LTK[index], len(layer.counts_E), found.experts_LTK[index + 1])
        expected_EE = routing.independent_layers(layer.counts_E, after.counts_E, num_tokens)
        between_shares.append(routing.coactivation(pairs_EE, layer.counts_E))
        between_ratios.append(_ratio(pairs_EE, expected_EE))
        every = np.ones_like(pairs_EE, bool)
        pairs = _pair_rows(pairs_EE, expected_EE, every, layer.counts_E, after.counts_E)
        listed += [{"layer": index + 1, "next_layer": index + 2, **pair} for pair in pairs]
    columns = ["layer", "next_layer", "expert", "other", "tokens", "expected", "ratio"]
    _write_csv(folder / "coactivation.csv", listed, [*columns, "share_of_expert", "share_of_other"])
    labels = [(f"sparse layer {index}: expert i", "expert j") for index in range(1, len(layers) + 1)]
    routing_plots.plot_coactivation(folder / "coactivation.png", "Co-activation", shares, ratios, labels)
    if between_shares:
        labels = [
            (f"expert i of sparse layer {index}", f"expert j of sparse layer {index + 1}")
            for index in range(1, len(layers))
        ]
        routing_plots.plot_coactivation(
            folder / "coactivation_between_layers.png",
            "Co-activation from layer to layer",
            between_shares,
            between_ratios,
            labels,
        )
    places = sorted(
        {(pair["layer"], pair["next_layer"]) for pair in listed}, key=lambda place: (place[1] - place[0], place)
    )
    lines = []
    for place in places:
        if place[0] - 1 not in routing_plots.shown_layers(len(layers)):
            continue
        here = [pair for pair in listed if (pair["layer"], pair["next_layer"]) == place]
        for pair in here[:_PRINTED_PAIRS]:
            lines.append(
                [
                    str(place[0]) if place[0] == place[1] else f"{place[0]} → {place[1]}",
                    f"{pair['expert']}, {pair['other']}",
                    str(pair["tokens"]),
                    f"{pair['expected']:.0f}",
                    f"{pair['ratio']:.2f}",
                    f"{pair['share_of_expert']:.1%}",
                    f"{pair['share_of_other']:.1%}",
                ]
            )
    if not lines:
        return "Co-activation: with one expert per token and one sparse layer there are no pairs."
    head = ["layer", "experts i, j", "tokens", "if independent", "ratio", "of i's tokens", "of j's tokens"]
    return "Pairs of experts that work together most, against independent choice\n" + _table(head, lines)


def _pair_rows(
    pairs_EE: np.ndarray, expected_EE: np.ndarray, wanted_EE: np.ndarray, rows_E: np.ndarray, columns_E: np.ndarray
) -> list[dict[str, Any]]:
    """The pairs whose ratio to chance is the largest."""
    first, second = np.nonzero(wanted_EE & (expected_EE >= _FEWEST_EXPECTED))
    ratio = pairs_EE[first, second] / expected_EE[first, second]
    return [
        {
            "expert": int(first[n]),
            "other": int(second[n]),
            "tokens": int(pairs_EE[first[n], second[n]]),
            "expected": float(expected_EE[first[n], second[n]]),
            "ratio": float(ratio[n]),
            "share_of_expert": float(pairs_EE[first[n], second[n]] / max(rows_E[first[n]], 1)),
            "share_of_other": float(pairs_EE[first[n], second[n]] / max(columns_E[second[n]], 1)),
        }
        for n in np.argsort(-ratio, kind="stable")[:_LISTED_PAIRS]
    ]


def _ratio(observed: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Observed over expected; not-a-number where too little is expected to say anything."""
    enough = expected >= _FEWEST_EXPECTED
    return np.where(enough, observed / np.where(enough, expected, 1), np.nan)


def _write_vocabulary(folder: Path, layers: Sequence[Layer], rows: Rows, tokenizer: Tokenizer, K: int) -> str:
    listed = [row for layer in layers for row in layer.tokens]
    columns = ["layer", "expert", "rank", "token_id", "token", "occurrences", "share_of_routings"]
    columns += ["share_of_occurrences", "average_share_of_routings"]
    _write_csv(folder / "vocabulary.csv", listed, columns)
    ids_X, occurrences_X = np.unique(rows.tokens_T, return_counts=True)
    frequent = ids_X[np.argsort(-occurrences_X, kind="stable")[:_PLOTTED_TOKENS]]
    names = [readable(tokenizer, int(token), ascii_only=True) for token in frequent]
    shares_LXE = [layer.frequent_share_XE for layer in layers]
    routing_plots.plot_vocabulary(folder / "vocabulary.png", shares_LXE, names, K)
    figures = [layer.figures for layer in layers]
    routing_plots.plot_specialisation(
        folder / "specialisation.png",
        [f["mutual_information"] for f in figures],
        [f["max_share"] for f in figures],
        [f["max_share_shuffled"] for f in figures],
        1 / K,
    )
    lines = []
    for index in routing_plots.shown_layers(len(layers)):
        by_expert: dict[int, list[dict[str, Any]]] = {}
        for row in layers[index].tokens:
            by_expert.setdefault(row["expert"], []).append(row)
        if len(by_expert) > _PRINTED_EXPERTS:  # those whose first tokens are most their own
            strength = {e: np.mean([row["share_of_routings"] for row in top[:5]]) for e, top in by_expert.items()}
            kept = sorted(sorted(by_expert, key=lambda e: -strength[e])[:_PRINTED_EXPERTS])
            by_expert = {expert: by_expert[expert] for expert in kept}
        for expert, top in by_expert.items():
            shown = [f"{row['token']} {row['share_of_routings']:.0%}" for row in top[:_PRINTED_TOKENS]]
            lines.append([str(index + 1), str(expert), f"{top[0]['average_share_of_routings']:.0%}", "  ".join(shown)])
    if not lines:
        return (
            f"Vocabulary specialisation: no token is in the text {_FEWEST_OCCURRENCES} times; give more with --tokens."
        )
    return (
        f"Tokens that an expert takes above its average, by the share of the token's routings (at most {1 / K:.0%};"
        f" tokens seen {_FEWEST_OCCURRENCES} times or more)\n"
        + _table(["layer", "expert", "average", "tokens"], lines, text_last=True)
    )


def _write_texts(folder: Path, layers: Sequence[Layer], rows: Rows, K: int) -> str:
    shares_LFE = [routing.specialisation(layer.text_counts_FE) for layer in layers]
    ratios_LFE = []  # to the mean of the texts: an imbalance that they share says nothing of them
    for layer, share_FE in zip(layers, shares_LFE, strict=True):
        expected_FE = np.sum(layer.text_counts_FE, axis=1, keepdims=True) * np.mean(share_FE, axis=0)
        ratios_LFE.append(_ratio(layer.text_counts_FE, expected_FE))
    listed = [
        {
            "layer": index,
            "text": name,
            "expert": expert,
            "share_of_routings": float(share_FE[text, expert]),
            "share_of_tokens": float(share_FE[text, expert] * K),
            "ratio_to_mean_of_texts": float(ratio_FE[text, expert]),
        }
        for index, (share_FE, ratio_FE) in enumerate(zip(shares_LFE, ratios_LFE, strict=True), 1)
        for text, name in enumerate(rows.names)
        for expert in range(share_FE.shape[1])
    ]
    _write_csv(folder / "texts.csv", listed)
    routing_plots.plot_texts(folder / "texts.png", ratios_LFE, rows.names)
    tokens_F = np.bincount(rows.texts_T, minlength=len(rows.names))
    lines = []
    for index in routing_plots.shown_layers(len(layers)):
        share_FE, ratio_FE = shares_LFE[index], np.nan_to_num(ratios_LFE[index])
        for text, name in enumerate(rows.names):
            top = np.argsort(-ratio_FE[text], kind="stable")[:5]
            experts = [
                f"{e}: {share_FE[text, e] * K:.0%} ({ratio_FE[text, e]:.2f} ×)" for e in top if ratio_FE[text, e] > 1
            ]
            lines.append([str(index + 1), name, str(tokens_F[text]), "  ".join(experts)])
    head = ["layer", "text", "tokens", "experts that it uses more than others do, by share of its tokens (× the mean)"]
    return "Specialisation by text\n" + _table(head, lines, text_last=True)


def _write_saturation(
    folder: Path, layers: Sequence[Layer], found: Routing, earlier: Iterable[Routing], K: int
) -> tuple[list[dict[str, Any]], str]:
    counts_LE = np.array([layer.counts_E for layer in layers])
    num_experts = counts_LE.shape[1]
    curves, chances = [], []
    for routed in chain(earlier, [found]):
        share_L = routing.saturation(routed.experts_LTK, found.experts_LTK)
        then_LE = [routing.expert_counts(experts_TK, num_experts) for experts_TK in routed.experts_LTK]
        chance_L = routing.chance_saturation(np.array(then_LE), counts_LE, K)
        chances.append(float(np.mean(chance_L)))
        curves += [
            {"step": routed.step, "layer": layer, "share": float(share), "chance": float(chance)}
            for layer, (share, chance) in enumerate(zip(share_L, chance_L, strict=True), 1)
        ]
    how = (
        "the phase keeps --checkpoint.keep checkpoints, one every --checkpoint.every steps: train with more to see more"
    )
    steps = sorted({row["step"] for row in curves})
    if len(steps) == 1:
        return [], f"Saturation: only the checkpoint of step {found.step} is there, nothing to compare with ({how})."
    _write_csv(folder / "saturation.csv", curves)
    share_LN = np.array([row["share"] for row in curves]).reshape(len(steps), -1).T
    routing_plots.plot_saturation(folder / "saturation.png", steps, share_LN, chances)
    shown = routing_plots.shown_layers(len(layers))
    lines = [
        [str(step), *(f"{share_LN[layer, n]:.1%}" for layer in shown), f"{chances[n]:.1%}"]
        for n, step in enumerate(steps)
    ]
    head = ["step", *(f"layer {layer + 1}" for layer in shown), "chance"]
    return (
        curves,
        f"Saturation: share of the experts chosen at each step that step {found.step} also chooses\n"
        + _table(head, lines)
        + f"\n({how})",
    )


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], text_last: bool = False) -> str:
    """Columns aligned to the right; `text_last`: the last one is text, and is left as it is."""
    widths = [max(len(line[n]) for line in [head, *lines]) for n in range(len(head))]
    if text_last:
        widths[-1] = 0

    def row(cells: Sequence[str]) -> str:
        return "  " + "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))

    return "\n".join(map(row, [head, *lines]))


def _write_csv(path: Path, lines: Sequence[dict[str, Any]], columns: Sequence[str] | None = None) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns or list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
