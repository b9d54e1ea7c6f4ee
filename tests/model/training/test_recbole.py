"""RecBole's YAML: every key is translated, ignored with a reason, or an error."""

import subprocess
import sys

import pytest

from model.config import Config, ConfigError, load_config
from model.recbole import IGNORED, MAPPED, RecBoleError, read_recbole, translate

EXAMPLE = """
data_path: {folder}
USER_ID_FIELD: user_id
ITEM_ID_FIELD: item_id
TIME_FIELD: timestamp
load_col: {{inter: [user_id, item_id, timestamp]}}
user_inter_num_interval: "[2,inf)"
item_inter_num_interval: "[2,inf)"
MAX_ITEM_LIST_LENGTH: 20
hidden_size: 16
n_layers: 1
n_heads: 2
hidden_dropout_prob: 0.5
attn_dropout_prob: 0.5
loss_type: 'CE'
train_neg_sample_args: ~
learning_rate: 1e-3
epochs: 2
memory_size: 30
retrieval_k: 10
adaptive_min_k: 2
adaptive_max_k: 12
memory_similarity_threshold: 0.4
memory_temperature: 0.5
memory_gate_max_influence: 0.3
lmd: 0.1
lmd_sem: 0.2
tau: 1
sim: dot
contrast: us_x
train_batch_size: 256
"""


def test_the_example_becomes_a_config(tmp_path):
    file = tmp_path / "seq.yaml"
    file.write_text(EXAMPLE.format(folder=tmp_path))
    config = load_config(file)
    assert config.encoder.window == 20
    assert config.encoder.dropout == 0.5
    assert config.dataset.core == 2
    assert config.training.learning_rate == 0.001  # YAML 1.1 reads 1e-3 as text
    assert (config.rules.capacity, config.rules.k_base, config.rules.k_min, config.rules.k_max) == (30, 10, 2, 12)
    assert (config.fusion.temperature, config.fusion.gate_max) == (0.5, 0.3)
    assert (config.training.contrast_weight, config.training.contrast_temperature) == (0.2, 1)
    ignored = read_recbole(file.read_text()).ignored
    assert ignored.keys() == {
        "attn_dropout_prob",
        "contrast",
        "data_path",
        "lmd",
        "load_col",
        "sim",
        "train_batch_size",
        "train_neg_sample_args",
    }


def test_every_mapped_key_exists_and_no_key_is_also_ignored():
    for section, name in MAPPED.values():
        assert name in getattr(Config(), section).model_dump()
    assert not MAPPED.keys() & IGNORED.keys()
    assert all(len(reason) > 3 for reason in IGNORED.values())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hiden_size": 64}, "hiden_size: unknown key, did you mean hidden_size"),
        ({"zzz": 1}, "zzz: unknown key$"),
        ({"loss_type": "BPR"}, "loss_type: BPR"),
        ({"user_inter_num_interval": "(5,10)"}, "user_inter_num_interval"),
        ({"user_inter_num_interval": "[5,inf)", "item_inter_num_interval": "[3,inf)"}, "must be equal"),
    ],
)
def test_what_has_no_counterpart_is_an_error_that_names_the_key(values, message):
    with pytest.raises(RecBoleError, match=message):
        translate(values)


def test_contrastive_terms_can_be_off_or_have_one_weight():
    assert translate({"lmd": 0.3}).config["training"]["contrast_weight"] == 0.3
    assert translate({"lmd": 0.3, "contrast": "none"}).config["training"]["contrast_weight"] == 0
    assert translate({"hidden_size": 64}).config == {"encoder": {"dim": 64}}


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not YAML"), ("- 1", "not a mapping"), ("hidden_size: wide", "encoder.dim")]
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, text, message):
    file = tmp_path / "c.yml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(file)
    assert str(file) in str(caught.value)


def test_training_by_a_recbole_config_finds_the_dataset_by_name(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    rows = [f"{user}\t{(user + step) % 9}\t{step}" for user in range(12) for step in range(8)]
    header = "user_id:token\titem_id:token\ttimestamp:float"
    (folder / "tiny.inter").write_text("\n".join([header, *rows]) + "\n")
    config = tmp_path / "seq.yaml"
    config.write_text(EXAMPLE.format(folder=tmp_path))
    command = [sys.executable, "-m", "api.cli", "train", "--dataset", "tiny", "--config", str(config)]
    done = subprocess.run([*command, "--out", str(tmp_path / "run")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "sim has no effect: the contrastive terms always compare by cosine" in done.stdout
    assert (tmp_path / "run" / "checkpoint.json").exists()
