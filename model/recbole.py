"""RecBole's YAML configs, for people who come from RecBole, DuoRec, RaSeRec or the published RAMRec code.

Every key is mapped to RAMRec's config, or ignored with a reason that the user is shown, or an error: nothing is dropped
in silence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import yaml

from model.errors import RamrecError


class RecBoleError(RamrecError):
    """A RecBole config that cannot be translated; names the key."""


MAPPED: dict[str, tuple[str, str]] = {
    "MAX_ITEM_LIST_LENGTH": ("encoder", "window"),
    "hidden_size": ("encoder", "dim"),
    "n_layers": ("encoder", "layers"),
    "n_heads": ("encoder", "heads"),
    "hidden_dropout_prob": ("encoder", "dropout"),
    "learning_rate": ("training", "learning_rate"),
    "weight_decay": ("training", "weight_decay"),
    "epochs": ("training", "max_epochs"),
    "stopping_step": ("training", "patience"),
    "seed": ("training", "seed"),
    "USER_ID_FIELD": ("dataset", "user_column"),
    "ITEM_ID_FIELD": ("dataset", "item_column"),
    "TIME_FIELD": ("dataset", "time_column"),
    "RATING_FIELD": ("dataset", "rating_column"),
    "memory_size": ("rules", "capacity"),
    "retrieval_k": ("rules", "k_base"),  # K of a user of medium entropy with a full bank
    "memory_similarity_threshold": ("rules", "similarity_threshold"),
    "adaptive_min_k": ("rules", "k_min"),
    "adaptive_max_k": ("rules", "k_max"),
    "memory_temperature": ("fusion", "temperature"),
    "memory_gate_max_influence": ("fusion", "gate_max"),
    "lmd_sem": ("training", "contrast_weight"),
    "tau": ("training", "contrast_temperature"),
}
"""RecBole key → (section, key) of RAMRec's config."""

_PROTOCOL = "evaluation is fixed: leave-one-out, all items ranked, unmasked and masked, HR and NDCG at 5 and 10"
_MACHINE = "the machine is chosen by the environment (OMP_NUM_THREADS, training.threads)"
_DISPLAY = "progress and results are always shown; --json writes them"
_FIXED = "fixed in RAMRec's encoder"
_MEMORY = "RAMRec's memory has no such switch: the gate learns how much memory counts"
IGNORED: dict[str, str] = {
    "train_batch_size": "batches are counted in positions (training.batch_tokens), not in augmented prefixes",
    "eval_batch_size": _PROTOCOL,
    "attn_dropout_prob": "one dropout for all places: hidden_dropout_prob",
    "inner_size": "always 4 times hidden_size",
    "hidden_act": _FIXED,
    "layer_norm_eps": _FIXED,
    "initializer_range": _FIXED,
    "learner": "AdamW with cosine decay",
    "clip_grad_norm": "gradients are clipped to norm 1",
    "train_neg_sample_args": "no negatives are sampled for the full softmax; see training.objective, negatives",
    "neg_sampling": "no negatives are sampled for the full softmax; see training.objective, negatives",
    "sim": "the contrastive terms always compare by cosine",
    "contrast": "both contrastive terms are used where lmd_sem or lmd is above 0",
    "eval_args": _PROTOCOL,
    "eval_setting": _PROTOCOL,
    "eval_step": "validated after every epoch",
    "metrics": _PROTOCOL,
    "topk": _PROTOCOL,
    "valid_metric": "NDCG@10",
    "valid_metric_bigger": "NDCG@10",
    "repeatable": "histories are kept as they are; repeats count",
    "data_path": "taken by --dataset",
    "dataset": "taken by --dataset",
    "model": "RAMRec",
    "load_col": "the columns named by *_FIELD are read",
    "field_separator": "found from the file",
    "seq_separator": "found from the file",
    "benchmark_filename": "split by RAMRec: leave-one-out",
    "LIST_SUFFIX": "sequences are made from the interactions",
    "ITEM_LIST_LENGTH_FIELD": "sequences are made from the interactions",
    "alias_of_item_id": "sequences are made from the interactions",
    "NEG_PREFIX": "no negatives are sampled for the full softmax",
    "gpu_id": _MACHINE,
    "use_gpu": _MACHINE,
    "device": _MACHINE,
    "nproc": _MACHINE,
    "worker": _MACHINE,
    "enable_amp": _MACHINE,
    "enable_scaler": _MACHINE,
    "reproducibility": "equal seeds give equal checkpoints",
    "state": _DISPLAY,
    "show_progress": _DISPLAY,
    "log_wandb": _DISPLAY,
    "wandb_project": _DISPLAY,
    "checkpoint_dir": "--out",
    "save_dataset": "reading takes a second",
    "save_dataloaders": "reading takes a second",
    "dataset_save_path": "reading takes a second",
    "dataloaders_save_path": "reading takes a second",
    "use_memory": _MEMORY,
    "use_adaptive_k": "rules.k_rule says how K is chosen",
    "memory_update_momentum": "rules.key_update: the paper's weight grows with the frequency",
}
"""RecBole key → why it has no effect."""

_SPECIAL = ("loss_type", "user_inter_num_interval", "item_inter_num_interval", "lmd")


@dataclass(frozen=True)
class Translated:
    """A RecBole config in RAMRec's terms: `config` for `Config.model_validate`, what was `ignored` and why, and the
    folder that RecBole would look for datasets in.
    """

    config: dict[str, dict[str, Any]] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    data_path: str | None = None


def read_recbole(text: str) -> Translated:
    """Translate the text of a YAML file. Raises RecBoleError."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecBoleError(f"not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping):
        raise RecBoleError("not a mapping of keys to values")
    return translate(values)


def translate(values: Mapping[Any, Any]) -> Translated:
    """Translate RecBole's keys.

    Raises:
        RecBoleError: a key is unknown (with the nearest known ones), or its value has no counterpart here.
    """
    done = Translated(data_path=values.get("data_path"))
    for key, value in values.items():
        if key in MAPPED:
            section, name = MAPPED[key]
            done.config.setdefault(section, {})[name] = value
        elif key in IGNORED:
            done.ignored[key] = IGNORED[key]
        elif key not in _SPECIAL:
            near = get_close_matches(str(key), [*MAPPED, *IGNORED, *_SPECIAL], n=2)
            raise RecBoleError(f"{key}: unknown key" + (f", meant: {' or '.join(near)}?" if near else ""))
    _loss(values, done)
    _core(values, done)
    _contrast(values, done)
    return done


def _loss(values: Mapping[Any, Any], done: Translated) -> None:
    kind = values.get("loss_type", "CE")
    if kind != "CE":
        raise RecBoleError(f"loss_type: {kind} is not offered; CE is, and gBCE by training.objective in a TOML config")


def _core(values: Mapping[Any, Any], done: Translated) -> None:
    """`[5,inf)` for users and items: the k of the k-core."""
    wanted = {key: values[key] for key in ("user_inter_num_interval", "item_inter_num_interval") if key in values}
    cores = {key: re.fullmatch(r"\[\s*(\d+)\s*,\s*inf\s*[)\]]", str(value)) for key, value in wanted.items()}
    for key, match in cores.items():
        if match is None:
            raise RecBoleError(f"{key}: {wanted[key]!r} is not of the form [5,inf)")
    found = {int(match[1]) for match in cores.values() if match}
    if len(found) > 1:
        raise RecBoleError(f"user_ and item_inter_num_interval must agree, they ask for {sorted(found)}")
    if found:
        done.config.setdefault("dataset", {})["core"] = max(1, found.pop())


def _contrast(values: Mapping[Any, Any], done: Translated) -> None:
    """One weight for both terms of DuoRec: lmd_sem, or lmd where only that is given; none for contrast: none."""
    training = done.config.setdefault("training", {})
    if str(values.get("contrast", "us_x")).lower() in ("none", "false"):
        training["contrast_weight"] = 0
    elif "lmd" in values and "lmd_sem" not in values:
        training["contrast_weight"] = values["lmd"]
    elif "lmd" in values:
        done.ignored["lmd"] = "one weight for both contrastive terms: lmd_sem"
    if not training:
        del done.config["training"]
