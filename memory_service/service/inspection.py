"""All that is known about a user, for people to look at. Pure."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from memory_service.protocol.user_memory import EntryOut, GoneOut, HowMany, QualityParts, UserMemory
from model.config import RulesConfig
from model.memory import habits
from model.memory import rules as rule
from model.memory.bank import Banks
from model.memory.plane import Plane
from model.memory.record import UserRecord
from model.memory.rules import Floats, Ints

THURSDAY = 3.0
"""Unix time begins on a Thursday: days from Monday to the beginning of its weeks."""


def user_memory(user_id: str, record: UserRecord, clusters: Ints, plane: Plane | None) -> UserMemory:
    """What a record tells. `clusters`: catalogue number → item cluster of the record's model. `plane`: where the keys
    of that model are drawn; None: the model is not loaded.
    """
    banks, rules = record.banks, record.banks.rules
    cluster = banks.entry_clusters(clusters)
    worth, valid = banks.quality(), banks.valid()
    entropy = rule.entropy(worth, cluster, rules.clusters)
    shares = rule.cluster_shares(worth * valid, cluster, rules.clusters)[0]
    own, collective = _how_many(entropy, banks.size, rules)
    prunes = rules.eviction == "quality" and record.size > 0
    return UserMemory(
        user_id=user_id,
        version=record.version,
        model_version=record.model_version,
        events=record.events,
        share=record.share,
        entropy=float(entropy[0]),
        k=own.k,
        capacity=rules.capacity,
        pruned=int(banks.pruned[0]),
        clusters={int(n): float(shares[n]) for n in np.flatnonzero(shares)},
        entries=_entries_out(banks, worth, cluster, plane),
        log=list(zip(record.log_item.tolist(), record.log_time.tolist(), strict=True)),
        seen=len(record.seen),
        catalogue_size=len(clusters) - 1,
        standing=_place(plane, rule.unit(record.state)) if record.state.any() else None,
        threshold=float(rule.pruning_threshold(worth, valid, rules)[0, 0]) if prunes else None,
        own=own,
        collective=collective,
        gone=_gone(record),
    )


def _how_many(entropy: Floats, size: Ints, rules: RulesConfig) -> tuple[HowMany, HowMany]:
    """K of the user's own memories, and of memories of others."""
    own_k, others = int(rule.own_k(entropy, size, rules)[0]), int(rule.collective_k(entropy, rules)[0])
    growth = float(rule.k_growth(size, rules)[0])
    return (
        HowMany(rules.k_base, growth, rules.k_min, rules.k_max, own_k),
        HowMany(rules.collective_k_base, 1.0, rules.collective_k_min, rules.collective_k_max, others),
    )


def _entries_out(banks: Banks, worth: Floats, cluster: Ints, plane: Plane | None) -> list[EntryOut]:
    fields, recency, occasions = banks.fields, banks.recency(), int(banks.occasions[0])
    parts = rule.quality_parts(fields["frequency"], recency, fields["access"], fields["rating"], banks.rules)
    seconds = banks.rules.time_unit == "seconds"
    entries = []
    for slot in range(int(banks.size[0])):
        one = {name: values[0, slot].tolist() for name, values in fields.items()}
        entries.append(
            EntryOut(
                item=one["item"],
                quality=float(worth[0, slot]),
                recency=float(recency[0, slot]),
                rating=None if np.isnan(one["rating"]) else one["rating"],
                time=one["time"],
                frequency=one["frequency"],
                access=one["access"],
                last_access=one["last_access"],
                cluster=int(cluster[0, slot]),
                parts=_parts(parts, (0, slot)),
                place=_place(plane, banks.key[0, slot]),
                first_time=one["first_time"],
                occasions_since=max(0, occasions - one["occasion"]),
                **(_rhythm(one) if seconds else {}),
            )
        )
    return entries


def _rhythm(entry: dict[str, Any]) -> dict[str, float | None]:
    """The habit of an entry: how often and when its item is taken."""
    again, span, sums = entry["frequency"] - 1, entry["time"] - entry["first_time"], entry["sums"]
    hour, thursday = (habits.usual_time(entry["frequency"], sums, period) for period in (24.0, 168.0))
    return {
        "mean_gap_s": span / again if again > 0 else None,
        "usual_hour": hour,
        "usual_day": None if thursday is None else (thursday / 24.0 + THURSDAY) % 7.0,
    }


def _gone(record: UserRecord) -> list[GoneOut]:
    """The items that are in the log but not in the bank, newest first."""
    banks = record.banks
    kept = banks.fields["item"][0, : record.size]
    newest_first = np.flatnonzero(~np.isin(record.log_item, kept))[::-1]
    item, newest, frequency = np.unique(record.log_item[newest_first], return_index=True, return_counts=True)
    if not len(item):
        return []
    last = record.log_time[newest_first[newest]]
    kept_time = banks.fields["time"][0, : record.size]
    recency = _recency(np.concatenate([last, kept_time]), banks.rules)[: len(item)]
    unrated = np.full(len(item), np.nan, np.float32)
    terms = (frequency, recency, np.zeros(len(item), np.int64), unrated, banks.rules)
    worth, parts = rule.quality(*terms), rule.quality_parts(*terms)
    return [
        GoneOut(
            item=int(item[n]),
            time=float(last[n]),
            frequency=int(frequency[n]),
            quality=float(worth[n]),
            parts=_parts(parts, (int(n),)),
        )
        for n in np.argsort(-last, kind="stable")
    ]


def _parts(parts: dict[str, NDArray[np.float32]], at: tuple[int, ...]) -> QualityParts:
    return QualityParts(**{name: float(part[at]) for name, part in parts.items()})


def _recency(time: Floats, rules: RulesConfig) -> Floats:
    recency: Floats = rule.age_recency(time[None], np.ones((1, len(time)), bool), rules)[0]
    return recency


def _place(plane: Plane | None, key: Floats) -> tuple[float, float] | None:
    if plane is None:
        return None
    x, y = plane.places(key).tolist()
    return x, y
