"""Translates RecBole's YAML configs, for users of RecBole, DuoRec, RaSeRec or the published RAMRec code.

Every key is translated, ignored with a reason that the user is shown, or an error. No key is dropped silently.
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
    """A RecBole config cannot be translated; the message names the key."""


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
"""(section, key) of RAMRec's config, by RecBole key."""

_PROTOCOL = "evaluation is fixed: leave-one-out, all items ranked, unmasked and masked, HR and NDCG at 5 and 10"
_MACHINE = "processor and threads are chosen by --device, OMP_NUM_THREADS and training.threads"
_DISPLAY = "progress and results are always shown; `ramrec evaluate --json` writes them to a file"
_FIXED = "fixed in RAMRec's encoder"
_MEMORY = "memory cannot be switched off: the gate learns how much it counts"
IGNORED: dict[str, str] = {
    "train_batch_size": "batches are counted in positions (training.batch_tokens), not in augmented prefixes",
    "eval_batch_size": _PROTOCOL,
    "attn_dropout_prob": "one dropout for all layers: hidden_dropout_prob",
    "inner_size": "always 4 times hidden_size",
    "hidden_act": _FIXED,
    "layer_norm_eps": _FIXED,
    "initializer_range": _FIXED,
    "learner": "always AdamW with cosine decay",
    "clip_grad_norm": "gradients are clipped to norm 1",
    "train_neg_sample_args": "the full softmax needs no negatives; see training.objective and training.negatives",
    "neg_sampling": "the full softmax needs no negatives; see training.objective and training.negatives",
    "sim": "the contrastive terms always compare by cosine",
    "contrast": "both contrastive terms are used where lmd_sem or lmd is above 0",
    "eval_args": _PROTOCOL,
    "eval_setting": _PROTOCOL,
    "eval_step": "validation follows every epoch",
    "metrics": _PROTOCOL,
    "topk": _PROTOCOL,
    "valid_metric": "always NDCG@10",
    "valid_metric_bigger": "always NDCG@10",
    "repeatable": "histories are kept as they are, with repeats",
    "data_path": "given by --dataset",
    "dataset": "given by --dataset",
    "model": "always RAMRec",
    "load_col": "the columns named by *_FIELD are read",
    "field_separator": "recognised from the file",
    "seq_separator": "recognised from the file",
    "benchmark_filename": "split by RAMRec: leave-one-out",
    "LIST_SUFFIX": "sequences are made from the interactions",
    "ITEM_LIST_LENGTH_FIELD": "sequences are made from the interactions",
    "alias_of_item_id": "sequences are made from the interactions",
    "NEG_PREFIX": "the full softmax needs no negatives",
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
    "checkpoint_dir": "given by --out",
    "save_dataset": "the dataset is read again, which takes a second",
    "save_dataloaders": "the dataset is read again, which takes a second",
    "dataset_save_path": "the dataset is read again, which takes a second",
    "dataloaders_save_path": "the dataset is read again, which takes a second",
    "use_memory": _MEMORY,
    "use_adaptive_k": "K is always adaptive; rules.k_rule chooses how",
    "memory_update_momentum": "the weight grows with the frequency, as in the paper; see rules.key_update",
}
"""Why a RecBole key has no effect, by key."""

_SPECIAL = ("loss_type", "user_inter_num_interval", "item_inter_num_interval", "lmd")


@dataclass(frozen=True)
class Translated:
    """A translated RecBole config: `config` for `Config.model_validate`, the `ignored` keys with reasons, and
    `data_path`, the folder in which RecBole looks for datasets.
    """

    config: dict[str, dict[str, Any]] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    data_path: str | None = None


def read_recbole(text: str) -> Translated:
    """Translate the text of a YAML file. Raises RecBoleError; see `translate`."""
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
        RecBoleError: a key is unknown (the message names similar ones), or its value cannot be translated.
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
            raise RecBoleError(f"{key}: unknown key" + (f", did you mean {' or '.join(near)}?" if near else ""))
    _loss(values, done)
    _core(values, done)
    _contrast(values, done)
    return done


def _loss(values: Mapping[Any, Any], done: Translated) -> None:
    kind = values.get("loss_type", "CE")
    if kind != "CE":
        raise RecBoleError(
            f"loss_type: {kind} is not supported; use CE, or training.objective in a TOML config for gBCE"
        )


def _core(values: Mapping[Any, Any], done: Translated) -> None:
    """Translate `[5,inf)` for users and items to the k of the k-core."""
    wanted = {key: values[key] for key in ("user_inter_num_interval", "item_inter_num_interval") if key in values}
    cores = {key: re.fullmatch(r"\[\s*(\d+)\s*,\s*inf\s*[)\]]", str(value)) for key, value in wanted.items()}
    for key, match in cores.items():
        if match is None:
            raise RecBoleError(f"{key}: {wanted[key]!r} is not of the form [5,inf)")
    found = {int(match[1]) for match in cores.values() if match}
    if len(found) > 1:
        raise RecBoleError(f"user_ and item_inter_num_interval must be equal, they are {sorted(found)}")
    if found:
        done.config.setdefault("dataset", {})["core"] = max(1, found.pop())


def _contrast(values: Mapping[Any, Any], done: Translated) -> None:
    """Translate the weight of DuoRec's terms: lmd_sem, or lmd if lmd_sem is missing, or 0 if contrast is none."""
    training = done.config.setdefault("training", {})
    if str(values.get("contrast", "us_x")).lower() in ("none", "false"):
        training["contrast_weight"] = 0
    elif "lmd" in values and "lmd_sem" not in values:
        training["contrast_weight"] = values["lmd"]
    elif "lmd" in values:
        done.ignored["lmd"] = "both contrastive terms have one weight: lmd_sem"
    if not training:
        del done.config["training"]
