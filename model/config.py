"""The configuration of a run, read from TOML and saved with the weights.

Unknown keys and values out of range are errors that name the key.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from model.errors import RamrecError
from model.memory.habits import FEATURES
from model.recbole import RecBoleError, read_recbole

RECBOLE_SUFFIXES = (".yaml", ".yml")
CONFIG_FOLDER = Path(__file__).parent / "configs"
Holdout = Literal["leave-one-out", "last-basket"]


class ConfigError(RamrecError):
    """A config cannot be used; the message names file and key."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DatasetConfig(_Section):
    """How a log of interactions becomes sequences."""

    core: int = Field(5, ge=1, description="k of the k-core filter: least interactions of every user and item")
    user_column: str = Field("user_id", description="column of the user's id, in CSV, Parquet and .inter files")
    item_column: str = Field("item_id", description="column of the item's id")
    time_column: str = Field("timestamp", description="column of the time, seconds UTC; may be missing from the data")
    rating_column: str = Field("rating", description="column of the rating; may be missing from the data")
    basket_column: str = Field("basket_id", description="column of the basket's id; may be missing from the data")
    holdout: Holdout = Field(
        "leave-one-out",
        description="what is kept from training for validation and test: each user's last two events, or last two "
        "baskets (events of equal time)",
    )


class EncoderConfig(_Section):
    """Shape of the sequence encoder."""

    dim: int = Field(64, ge=4, le=16384, description="d: length of states and items, without the sketch")
    layers: int = Field(2, ge=1, le=256, description="transformer blocks")
    heads: int = Field(2, ge=1, description="attention heads of a block; must divide dim")
    window: int = Field(50, ge=4, le=512, description="L: the most items that a state depends on")
    stride: int | None = Field(None, ge=1, description="items by which a full window moves at a time; none: L/4")
    dropout: float = Field(0.3, ge=0, lt=1, description="share of activations dropped in training")
    score: Literal["dot", "cosine"] = Field(
        "dot", description="logit of an item: dot product of state and item, or their cosine / temperature"
    )
    temperature: float = Field(0.07, gt=0, description="divisor of cosine scores")

    skip: bool = Field(
        False, description="whether the decayed mean of the window's items is added to the state; needs score = cosine"
    )
    skip_decay: float = Field(0.8, gt=0, le=1, description="weight of an item in that mean relative to the next one")
    sketch: int = Field(
        0, ge=0, le=512, description="dimensions of keys that identify the last items; 0: none; needs score = cosine"
    )
    sketch_decay: float = Field(0.5, gt=0, le=1, description="weight of an item in the sketch relative to the next one")

    @property
    def width(self) -> int:
        """Length of states, keys and queries: the part that is scored, then the sketch."""
        return self.dim + self.sketch

    @property
    def window_stride(self) -> int:
        """Items by which a full window moves at a time."""
        return self.stride or self.window // 4

    @model_validator(mode="after")
    def _fits(self) -> EncoderConfig:
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not divisible by heads {self.heads}")
        if self.window_stride > self.window:
            raise ValueError(f"stride {self.stride} is larger than window {self.window}")
        if (self.skip or self.sketch) and self.score != "cosine":
            raise ValueError("skip and sketch need score = cosine: they add directions")
        return self


class RulesConfig(_Section):
    """Parameters of the memory rules (`model.memory.rules`)."""

    capacity: int = Field(75, ge=1, le=1000, description="entries that a bank holds")
    time_unit: Literal["seconds", "position"] = Field(
        "seconds", description="what recency counts: seconds, or entries if the log has no times; set by training"
    )
    half_life_s: float = Field(
        30 * 86400.0, gt=0, description="half-life of recency in seconds, for time_unit = seconds"
    )
    half_life_entries: float = Field(
        25.0, gt=0, description="half-life of recency in entries, for time_unit = position"
    )
    rating_min: float = Field(1.0, description="lowest rating; training lowers it to fit the data")
    rating_max: float = Field(5.0, description="highest rating; training raises it to fit the data")
    weight_frequency: float = Field(0.3, ge=0, description="weight of frequency in the quality of an entry")
    weight_recency: float = Field(0.4, ge=0, description="weight of recency in the quality of an entry")
    weight_access: float = Field(0.1, ge=0, description="weight of past retrievals in the quality of an entry")
    weight_rating: float = Field(0.2, ge=0, description="weight of the rating in the quality of an entry")
    eviction: Literal["quality", "first-in", "random"] = Field(
        "quality",
        description="which entries a bank over capacity forgets: those of low quality, the oldest, or random ones; the "
        "last two exist for comparison",
    )
    key_update: Literal["ema", "latest"] = Field(
        "ema", description="key of an item taken again: an exponential moving average (paper), or the newest key"
    )
    prune_std: float = Field(2.0, ge=0, description="c of the pruning threshold on quality q, mean(q) - c·std(q)")
    similarity_threshold: float = Field(
        0.4, ge=-1, le=1, description="least similarity (cosine) of an own memory that is retrieved by similarity"
    )
    clusters: int = Field(32, ge=2, le=65536, description="item clusters over which entropy is computed")
    k_rule: Literal["adaptive", "paper"] = Field(
        "adaptive",
        description="how K of the own scope grows with the n entries of a bank: sqrt(n / capacity), or "
        "min(1, sqrt(n / 100)) (paper)",
    )
    k_base: float = Field(13.0, gt=0, description="K of the own scope for a full bank of entropy 0.5")
    k_min: int = Field(3, ge=1, description="least K of the own scope")
    k_max: int = Field(20, ge=1, le=100, description="largest K of the own scope")
    collective_k_base: float = Field(20.0, gt=0, description="K of the collective scope for entropy 0.5")
    collective_k_min: int = Field(10, ge=1, description="least K of the collective scope")
    collective_k_max: int = Field(40, ge=1, le=100, description="largest K of the collective scope")
    collective_codes: int = Field(2000, ge=1, description="entries of others that a search compares with the query")
    collective_bits: Literal[4, 8] = Field(
        8,
        description="bits for each dimension of a key in the collective index; 4 takes three fifths of the memory and "
        "finds slightly fewer of the best entries",
    )
    repeat_share: float = Field(
        0.0, ge=0, le=1, description="share of events that repeat an item of the user; set by training"
    )
    exclude_seen: bool = Field(
        True,
        description="whether recommendations leave out items that the user had, unless a request says; set by training",
    )
    longest_gap_s: float = Field(
        365 * 86400.0,
        gt=0,
        description="longest time in seconds since the user's last event that habits count; set by training",
    )
    activation: dict[str, float] = Field(
        {},
        description="weights of features (`habits.FEATURES`, `similarity`) by which own memories are retrieved; empty: "
        "by similarity alone; set by training",
    )

    @model_validator(mode="after")
    def _consistent(self) -> RulesConfig:
        weights = (self.weight_frequency, self.weight_recency, self.weight_access, self.weight_rating)
        if sum(weights) <= 0:
            raise ValueError("at least one quality weight must be above 0")
        if self.rating_max <= self.rating_min:
            raise ValueError(f"rating_max {self.rating_max} must exceed rating_min {self.rating_min}")
        unknown = self.activation.keys() - {*FEATURES, "similarity"}
        if unknown:
            raise ValueError(f"activation names {min(unknown)}, which is not a feature of a memory")
        if self.k_min > self.k_max or self.collective_k_min > self.collective_k_max:
            raise ValueError("k_min must not exceed k_max")
        return self


class FusionConfig(_Section):
    """Shape of the memory fusion."""

    heads: int = Field(4, ge=1, description="heads of the cross-attention over memories; must divide encoder.dim")
    temperature: float = Field(0.5, gt=0, description="divisor of the similarity that is added to attention logits")
    copy_sharpness: float = Field(
        16.0, gt=0, description="initial factor on similarities in copying; training learns it"
    )
    gate_max: float = Field(1.0, gt=0, le=1, description="largest share of memory in the fused state")
    dropout: float = Field(0.1, ge=0, lt=1, description="share of activations dropped in training")
    repeat_hidden: int = Field(32, ge=1, le=1024, description="width of the repeat head's layers")
    attention: bool = Field(True, description="whether memories are fused into the state; set by training")
    copying: bool = Field(True, description="whether items of others' memories are copied; set by training")
    repeat_log_p: bool = Field(
        True, description="whether the repeat head is shown the model's own log-probability; set by training"
    )
    repeats: bool = Field(True, description="whether own memories add to the logits of their items; set by training")


class TrainingConfig(_Section):
    """How encoder and fusion are fitted."""

    seed: int = Field(0, description="seed of all random numbers of a run")
    objective: Literal["softmax", "sampled", "gbce"] = Field(
        "softmax",
        description="loss of the encoder: softmax over all items, softmax over `negatives` items corrected by log Q, "
        "or gBCE (gSASRec)",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="number type of the full softmax; auto: bfloat16 on processors and GPUs with instructions for it",
    )
    negatives: int = Field(1024, ge=1, description="uniform negatives of a batch, for the objectives sampled and gbce")
    calibration: float = Field(0.75, ge=0, le=1, description="t of gBCE, for the objective gbce")
    contrast_weight: float = Field(0.0, ge=0, description="weight of DuoRec's contrastive terms; 0: none")
    contrast_temperature: float = Field(1.0, gt=0, description="temperature of the contrastive terms")
    fusion_targets: Literal["held-out-users", "validation"] = Field(
        "held-out-users",
        description="what the fusion is fitted on: training events of users kept from the encoder, or validation items "
        "of four fifths of all users, judged by those of the others",
    )
    held_out_users: float = Field(
        0.15, gt=0, lt=0.9, description="share of users kept from the encoder, for fusion_targets = held-out-users"
    )
    batch_tokens: int = Field(8192, ge=64, description="positions of a batch of the encoder, padding included")
    learning_rate: float = Field(1e-3, gt=0, description="learning rate of the encoder (AdamW)")
    weight_decay: float = Field(0.01, ge=0, description="weight decay of the encoder")
    final_rate: float = Field(
        0.05, gt=0, le=1, description="share of the learning rate left at max_epochs (cosine decay)"
    )
    max_epochs: int = Field(150, ge=1, description="most epochs of the encoder")
    patience: int = Field(10, ge=1, description="epochs of the encoder without a better NDCG@10 before it stops")
    fusion_samples: int = Field(40_000, ge=1, description="most events that the fusion is fitted on, drawn by the seed")
    fusion_batch: int = Field(256, ge=1, description="events of a batch of the fusion")
    fusion_learning_rate: float = Field(1e-3, gt=0, description="learning rate of cross-attention and gate")
    copy_learning_rate: float = Field(1e-2, gt=0, description="learning rate of copying")
    fusion_calibration_rate: float = Field(3e-3, gt=0, description="learning rate of shift and repeat bias")
    rank_temperature: float = Field(0.1, gt=0, description="temperature of the smooth rank in the loss of the fusion")
    repeat_positions: int = Field(
        50, ge=1, description="newest training events of each user that habits are learned on"
    )
    repeat_samples: int = Field(
        40_000, ge=1, description="most of these events that the repeat head is fitted on, drawn by the seed"
    )
    repeat_learning_rate: float = Field(3e-3, gt=0, description="learning rate of the repeat head")
    repeat_temperature: float = Field(
        1.0, gt=0, description="temperature of the smooth rank in the loss of the repeat head"
    )
    repeat_max_epochs: int = Field(8, ge=1, description="most epochs of the repeat head")
    fusion_weight_decay: float = Field(0.01, ge=0, description="weight decay of the fusion")
    fusion_max_epochs: int = Field(30, ge=1, description="most epochs of calibration and fusion")
    fusion_patience: int = Field(4, ge=1, description="epochs of the fusion without a better NDCG@10 before it stops")
    threads: int = Field(0, ge=0, description="threads of PyTorch; 0: OMP_NUM_THREADS, or all cores")


class Config(_Section):
    """The configuration of a run, saved as JSON with the weights."""

    dataset: DatasetConfig = DatasetConfig()
    encoder: EncoderConfig = EncoderConfig()
    rules: RulesConfig = RulesConfig()
    fusion: FusionConfig = FusionConfig()
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.encoder.dim % self.fusion.heads:
            raise ValueError(f"encoder.dim {self.encoder.dim} is not divisible by fusion.heads {self.fusion.heads}")
        return self


def load_config(path: str | Path) -> Config:
    """Read a config from a TOML file, from a RecBole YAML file (`model.recbole`), or a shipped one by name (`ml-100k`).

    Raises:
        ConfigError: no such file, not TOML, an unknown key, or a value out of range.
    """
    file = Path(path)
    if not file.is_file() and (CONFIG_FOLDER / f"{path}.toml").exists():
        file = CONFIG_FOLDER / f"{path}.toml"
    try:
        text = file.read_text(encoding="utf-8")
        values = read_recbole(text).config if file.suffix in RECBOLE_SUFFIXES else tomllib.loads(text)
        return Config.model_validate(values)
    except OSError as error:
        shipped = ", ".join(sorted(p.stem for p in CONFIG_FOLDER.glob("*.toml")))
        raise ConfigError(f"cannot read config {path}: {error.strerror} (shipped: {shipped})") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"config {file} is not TOML: {error}") from error
    except RecBoleError as error:
        raise ConfigError(f"config {file}: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"config {file}: {describe(error)}") from error


def describe(error: ValidationError) -> str:
    """All problems of a validation in one line: `section.key: what is wrong; …`."""
    parts = []
    for problem in error.errors(include_url=False, include_context=False):
        key = ".".join(str(part) for part in problem["loc"])
        what = "unknown key" if problem["type"] == "extra_forbidden" else problem["msg"]
        parts.append(f"{key}: {what}" if key else what)
    return "; ".join(parts)
