"""Retrieval for users who ignore items: their altered records answer, and leave nothing behind."""

import numpy as np
import pytest

from memory_service.protocol.columns import BadRequest
from memory_service.protocol.question import Question
from memory_service.protocol.structs import RetrieveRequest
from tests.memory_service.calling import remember, service, took


@pytest.fixture
def here(run, valkey_url, go):
    """A started memory service that knows the user u, who took i1 to i4."""
    started = service(run, valkey_url)
    go(started.start())
    go(remember(started, "u", *(took(n, f"i{n + 1}") for n in range(4))))
    yield started
    go(started.close())


def question(of, *users: str, **more) -> Question:
    return Question.unpacked(RetrieveRequest(of.model_version, list(users), **more))


def test_users_whose_names_look_like_rows_are_users_like_others(here, go):
    """Altered records answer by row; no user id stands for them."""
    go(remember(here, "\x000", took(0, "i9")))
    answer = go(here.retrieve(question(here, "u", "\x000", "u", ignore={0: [1, 2]})))
    assert answer.retrieved.bank_size.tolist() == [2, 1, 4]
    assert answer.without.keys() == {0}
    assert here.resident_users == 2


def test_an_altered_record_is_in_no_slot_afterwards(here, go):
    residents = here.serving.residents
    before = len(residents._free)
    for _ in range(3):
        go(here.retrieve(question(here, "u", "u", ignore={0: [1], 1: [2]})))
    assert (len(residents), len(residents._free)) == (1, before)
    assert not residents.size[residents._free].any()


def test_an_answer_has_arrays_of_the_length_of_the_question(here, go):
    answer = go(here.retrieve(question(here, "u", "", "nobody", entropy=np.full(3, 0.25, "<f4").tobytes())))
    assert answer.known.tolist() == [True, False, False]
    assert answer.states.shape == (3, here.serving.dim)
    assert [items.tolist() for items in answer.seen] == [[1, 2, 3, 4], [], []]
    assert answer.retrieved.entropy[1:].tolist() == [0.25, 0.25]
    assert not answer.degraded


def test_queries_of_another_width_are_refused(here, go):
    narrow = question(here, "u", query_rows=b"\0\0\0\0", queries=np.zeros(3, "<f4").tobytes())
    with pytest.raises(BadRequest, match="expected 16"):
        go(here.retrieve(narrow))
