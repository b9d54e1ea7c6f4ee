"""Every number that a run depends on, read from TOML and saved beside the weights.

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
    """A config that cannot be used; names file and key."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DatasetConfig(_Section):
    """How a log of interactions becomes sequences."""

    core: int = Field(5, ge=1, description="k of the iterated k-core filter over users and items")
    user_column: str = "user_id"
    item_column: str = "item_id"
    time_column: str = "timestamp"
    rating_column: str = "rating"
    basket_column: str = "basket_id"
    holdout: Holdout = Field(
        "leave-one-out",
        description="what is kept from training: each user's last two events, or the last two baskets (equal times)",
    )


class EncoderConfig(_Section):
    """Shape of the sequence encoder."""

    dim: int = Field(64, ge=4, le=16384)
    layers: int = Field(2, ge=1, le=256)
    heads: int = Field(2, ge=1)
    window: int = Field(50, ge=4, le=512, description="L: the most items that one state looks back on")
    stride: int | None = Field(None, ge=1, description="steps in which a full window moves; None: L/4")
    dropout: float = Field(0.3, ge=0, lt=1)
    score: Literal["dot", "cosine"] = Field("dot", description="cosine: states and items of unit length / √temperature")
    temperature: float = Field(0.07, gt=0, description="of cosine scores")

    skip: bool = Field(False, description="add the decayed mean of the window's items to the state; cosine only")
    skip_decay: float = Field(0.8, gt=0, le=1, description="weight of an item against the one after it in that mean")
    sketch: int = Field(
        0, ge=0, le=512, description="dimensions that name the last items in keys, 0: none; cosine only"
    )
    sketch_decay: float = Field(0.5, gt=0, le=1, description="weight of an item against the one after it in the sketch")

    @property
    def width(self) -> int:
        """Length of states, keys and queries: the part that scores, then the sketch."""
        return self.dim + self.sketch

    @property
    def window_stride(self) -> int:
        """Steps in which a full window moves, in items."""
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

    capacity: int = Field(75, ge=1, le=1000)
    time_unit: Literal["seconds", "position"] = Field(
        "seconds", description="what recency measures: event times, or order where there are none"
    )
    half_life_s: float = Field(30 * 86400.0, gt=0, description="recency half-life for time_unit=seconds")
    half_life_entries: float = Field(25.0, gt=0, description="the same for time_unit=position")
    rating_min: float = 1.0
    rating_max: float = 5.0
    weight_frequency: float = Field(0.3, ge=0)
    weight_recency: float = Field(0.4, ge=0)
    weight_access: float = Field(0.1, ge=0)
    weight_rating: float = Field(0.2, ge=0)
    eviction: Literal["quality", "first-in", "random"] = Field(
        "quality", description="what an over-full bank forgets; the others exist for comparison"
    )
    key_update: Literal["ema", "latest"] = Field(
        "ema", description="key of an item taken again: blended (paper), or that of the last time"
    )
    prune_std: float = Field(2.0, ge=0, description="c of the adaptive threshold mean(q) - c*std(q)")
    similarity_threshold: float = Field(0.4, ge=-1, le=1)
    clusters: int = Field(32, ge=2, le=65536, description="item clusters that entropy is measured over")
    k_rule: Literal["adaptive", "paper"] = "adaptive"
    k_base: float = Field(13.0, gt=0)
    k_min: int = Field(3, ge=1)
    k_max: int = Field(20, ge=1, le=100)
    collective_k_base: float = Field(20.0, gt=0)
    collective_k_min: int = Field(10, ge=1)
    collective_k_max: int = Field(40, ge=1, le=100)
    collective_codes: int = Field(2000, ge=1, description="entries of others that a search looks at")
    collective_bits: Literal[4, 8] = Field(
        8, description="of a dimension of others' keys in the index; 4: three fifths of the memory, finds a little less"
    )
    repeat_share: float = Field(
        0.0, ge=0, le=1, description="share of events that repeat an item of the user's; training measures it"
    )
    exclude_seen: bool = Field(
        True, description="whether lists leave out what the user had, unless a request says; training decides"
    )
    longest_gap_s: float = Field(
        365 * 86400.0, gt=0, description="ages end so long after the user's last event; training measures it"
    )
    activation: dict[str, float] = Field(
        {},
        description="weights by which own memories are retrieved (names: `habits.FEATURES`, `similarity`); "
        "training fits them, none: by similarity alone",
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
            raise ValueError(f"activation names {min(unknown)}, which is no feature of a memory")
        if self.k_min > self.k_max or self.collective_k_min > self.collective_k_max:
            raise ValueError("k_min must not exceed k_max")
        return self


class FusionConfig(_Section):
    """Shape of the memory fusion."""

    heads: int = Field(4, ge=1)
    temperature: float = Field(0.5, gt=0, description="similarity / temperature is added to attention logits")
    copy_sharpness: float = Field(16.0, gt=0, description="where the learned factor on similarities starts, copying")
    gate_max: float = Field(1.0, gt=0, le=1, description="cap on the share of memory in the fused state")
    dropout: float = Field(0.1, ge=0, lt=1)
    repeat_hidden: int = Field(32, ge=1, le=1024, description="width of the repeat head's layers")
    attention: bool = Field(True, description="whether memories are fused into the state; training decides")
    copying: bool = Field(True, description="whether others' items are copied; training decides")
    repeat_log_p: bool = Field(
        True, description="whether the repeat head looks at the model's own log-probability; training decides"
    )
    repeats: bool = Field(True, description="whether own memories add to their items' logits; training decides")


class TrainingConfig(_Section):
    """How encoder and fusion are fitted."""

    seed: int = 0
    objective: Literal["softmax", "sampled", "gbce"] = Field(
        "softmax", description="over all items; over `negatives` of them, corrected by log Q; gBCE (gSASRec)"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the full softmax; auto: bfloat16 where the processor has instructions for it"
    )
    negatives: int = Field(1024, ge=1, description="uniform negatives of a batch, for sampled and gbce")
    calibration: float = Field(0.75, ge=0, le=1, description="t of gBCE")
    contrast_weight: float = Field(0.0, ge=0, description="of DuoRec's contrastive terms beside the objective")
    contrast_temperature: float = Field(1.0, gt=0)
    fusion_targets: Literal["held-out-users", "validation"] = Field(
        "held-out-users",
        description="what the fusion is fitted on: all training positions of users that the encoder never saw, or the "
        "validation items of four fifths of all users, judged on the others",
    )
    held_out_users: float = Field(0.15, gt=0, lt=0.9, description="share of users kept from the encoder, if any are")
    batch_tokens: int = Field(8192, ge=64, description="positions a batch, padding included")
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    final_rate: float = Field(0.05, gt=0, le=1, description="share of the rate left at max_epochs; cosine decay")
    max_epochs: int = Field(150, ge=1)
    patience: int = Field(10, ge=1, description="epochs without a better validation NDCG@10")
    fusion_samples: int = Field(
        40_000, ge=1, description="most events that the fusion is fitted on, chosen by the seed"
    )
    fusion_batch: int = Field(256, ge=1)
    fusion_learning_rate: float = Field(1e-3, gt=0)
    copy_learning_rate: float = Field(1e-2, gt=0, description="for copying")
    fusion_calibration_rate: float = Field(3e-3, gt=0, description="learning rate of shift and repeat bias")
    rank_temperature: float = Field(0.1, gt=0, description="of the smooth rank that the fusion is fitted by")
    repeat_positions: int = Field(50, ge=1, description="newest training events of each user to learn habits on")
    repeat_samples: int = Field(40_000, ge=1, description="most of these events that the repeat head is fitted on")
    repeat_learning_rate: float = Field(3e-3, gt=0)
    repeat_temperature: float = Field(1.0, gt=0, description="of the smooth rank that the repeat head is fitted by")
    repeat_max_epochs: int = Field(8, ge=1)
    fusion_weight_decay: float = Field(0.01, ge=0)
    fusion_max_epochs: int = Field(30, ge=1)
    fusion_patience: int = Field(4, ge=1)
    threads: int = Field(0, ge=0, description="torch threads; 0: as OMP_NUM_THREADS says, or all cores")


class Config(_Section):
    """One run. Saved as JSON beside the weights."""

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
    """Read a config from TOML, or from a RecBole YAML file (`model.recbole`). A bare name (`ml-100k`) means the shipped
    file of that name.

    Raises:
        ConfigError: no such file, not TOML, unknown key, or a value out of range; the key is named.
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
    """One line for all problems of a validation: `section.key: what is wrong`."""
    parts = []
    for problem in error.errors(include_url=False, include_context=False):
        key = ".".join(str(part) for part in problem["loc"])
        what = "unknown key" if problem["type"] == "extra_forbidden" else problem["msg"]
        parts.append(f"{key}: {what}" if key else what)
    return "; ".join(parts)
