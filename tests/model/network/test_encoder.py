import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import EncoderConfig
from model.memory.record import EncodeJob
from model.memory.rules import window_start
from model.network.encoder import SequenceEncoder, StateRequests, encode_states

CONFIG = EncoderConfig(dim=16, layers=2, heads=2, window=8, dropout=0.5)


@pytest.fixture(scope="module")
def encoder() -> SequenceEncoder:
    torch.manual_seed(0)
    return SequenceEncoder(CONFIG, 30).eval()


def states_of(encoder: SequenceEncoder, items: list[int]) -> np.ndarray:
    with torch.inference_mode():
        return encoder(torch.tensor([items], dtype=torch.int64))[0].numpy()


def direct_state(encoder: SequenceEncoder, items: list[int], position: int) -> np.ndarray:
    """The rule by hand: encode items[w(t):t] on its own and take the last state."""
    start = int(window_start(position, CONFIG.window, CONFIG.window_stride))
    known = [item for item in items[start:position] if item]
    return states_of(encoder, known)[-1]


def test_the_first_state_is_the_same_for_all_users(encoder):
    assert np.allclose(states_of(encoder, [1, 2])[0], states_of(encoder, [7])[0], atol=1e-6)


def test_a_state_does_not_see_later_items(encoder):
    assert np.allclose(states_of(encoder, [1, 2, 3, 4])[:3], states_of(encoder, [1, 2, 9, 9])[:3], atol=1e-6)
    assert not np.allclose(states_of(encoder, [1, 2, 3])[3], states_of(encoder, [1, 2, 9])[3], atol=1e-3)


def test_padding_changes_no_state(encoder):
    assert np.allclose(states_of(encoder, [4, 5, 6])[:4], states_of(encoder, [4, 5, 6, 0, 0, 0])[:4], atol=1e-6)


def test_padding_has_no_logit(encoder):
    assert torch.isneginf(encoder.logits(torch.zeros(1, 16))[:, 0]).all()


@settings(max_examples=40, deadline=None)
@given(items=st.lists(st.integers(0, 30), min_size=0, max_size=40), data=st.data())
def test_bulk_states_equal_states_one_by_one_however_events_are_chunked(encoder, items, data):
    positions = data.draw(st.lists(st.integers(0, len(items)), max_size=6))
    job = EncodeJob(0, np.array(items, np.uint32), np.array(positions, np.int64))
    bulk = encode_states(encoder, StateRequests.of_jobs([job]))
    for found, position in zip(bulk, [*positions, len(items)], strict=True):
        assert np.allclose(found, direct_state(encoder, items, position), atol=1e-5)


def test_states_at_some_places_are_those_among_all():
    torch.manual_seed(1)
    encoder = SequenceEncoder(CONFIG.model_copy(update={"skip": True, "sketch": 8, "dropout": 0.0}), 30)
    items = torch.tensor([[4, 5, 6, 7, 8, 9], [3, 2, 1, 0, 0, 0]])
    at = torch.tensor([[6, 0, 3], [3, 3, 1]])
    with torch.inference_mode():
        every, some = encoder.sketched(items), encoder.sketched(items, at)
    assert torch.allclose(some, every.gather(1, at[..., None].expand(-1, -1, every.shape[-1])), atol=1e-5)


def test_a_truncated_log_gives_the_same_states_once_its_windows_are_inside(encoder):
    items = list(np.random.default_rng(0).integers(1, 31, 60))
    tail = EncodeJob(30, np.array(items[30:], np.uint32), np.array([45, 59], np.int64))
    found = encode_states(encoder, StateRequests.of_jobs([tail]))
    for state, position in zip(found, [45, 59, 60], strict=True):
        assert np.allclose(state, direct_state(encoder, items, position), atol=1e-5)


def test_many_jobs_at_once_equal_each_alone(encoder):
    rng = np.random.default_rng(1)
    jobs = [EncodeJob(0, rng.integers(0, 31, n).astype(np.uint32), rng.integers(-1, n + 1, 3)) for n in (0, 1, 9, 33)]
    together = encode_states(encoder, StateRequests.of_jobs(jobs))
    alone = np.concatenate([encode_states(encoder, StateRequests.of_jobs([job])) for job in jobs])
    assert np.allclose(together, alone, atol=1e-5)


def test_the_sketch_names_the_last_items_and_scores_nothing():
    torch.manual_seed(0)
    shape = CONFIG.model_dump() | {"score": "cosine", "skip": True}
    encoder = SequenceEncoder(EncoderConfig(**shape | {"sketch": 64}), 30).eval()
    jobs = [EncodeJob(0, np.array(items, np.uint32), np.array([0])) for items in ([1, 2, 3], [9, 8, 3], [3, 2, 1], [0])]
    states = encode_states(encoder, StateRequests.of_jobs(jobs))
    assert states.shape == (8, 16 + 64)
    assert np.allclose(states[:, :16], encode_plain(encoder, jobs), atol=1e-5)
    before_any, after = states[::2, 16:], states[1::2, 16:]
    assert not before_any.any()
    assert not after[3].any()  # only an unknown item
    same_last, same_set = after[0] @ after[1], after[0] @ after[2]
    length = after[0] @ after[0]
    assert length == pytest.approx(1 / encoder.config.temperature, rel=1e-4)
    # weights 1, ½, ¼ over their norm: the last item alone gives 1/1.3125 of full likeness
    assert same_last / length == pytest.approx(1 / 1.3125, abs=0.3)
    assert same_last > same_set
    assert torch.allclose(encoder.logits(torch.from_numpy(states)), encoder.logits(torch.from_numpy(states[:, :16])))


def encode_plain(encoder: SequenceEncoder, jobs: list[EncodeJob]) -> np.ndarray:
    """States without the sketch, one by one."""
    found = [(states_of(encoder, []), states_of(encoder, [int(i) for i in job.items if i])) for job in jobs]
    return np.concatenate([[first[0], last[-1]] for first, last in found])


def test_an_event_older_than_the_log_gets_the_first_state(encoder):
    job = EncodeJob(20, np.array([3, 4, 5], np.uint32), np.array([-1], np.int64))
    assert np.allclose(encode_states(encoder, StateRequests.of_jobs([job]))[0], states_of(encoder, [])[0], atol=1e-6)
