"""Which server has which hash slot, from CLUSTER SLOTS and from redirections."""

import pytest

from memory_service.store.redis.topology import Address, Topology

A, B, C, D = (Address("host", port) for port in (1, 2, 3, 4))


def server(node: Address) -> list:
    return [node.host.encode(), node.port, b"id", []]


@pytest.fixture
def topology() -> Topology:
    """Two shards: A with the replica B has the ends, C with D the middle."""
    ranges = [[10000, 16383, server(A), server(B)], [5000, 9999, server(C), server(D)], [0, 4999, server(A), server(B)]]
    return Topology.parsed(ranges, A)


def test_slots_have_primaries_which_are_in_the_order_of_their_first_slots(topology):
    assert [topology.primary_of(slot) for slot in (0, 4999, 5000, 9999, 10000, 16383)] == [A, A, C, C, A, A]
    assert topology.primaries() == [A, C]
    assert topology.servers() == {A, B, C, D}
    assert topology.is_complete


@pytest.mark.parametrize("host", [b"", None, ""])
def test_a_server_that_does_not_know_its_host_is_the_one_that_was_asked(host):
    topology = Topology.parsed([[0, 16383, [host, 7]]], Address("asked", 1))
    assert topology.primaries() == [Address("asked", 7)]


def test_where_a_replica_takes_over_its_whole_shard_follows(topology):
    topology.move(3, B)
    assert topology.primaries() == [B, C]
    assert topology.primary_of(16000) == B
    assert topology.servers() == {A, B, C, D}


def test_where_a_slot_moves_the_others_stay(topology):
    topology.move(3, C)
    assert [topology.primary_of(slot) for slot in (2, 3, 4)] == [A, C, A]
    assert topology.primaries() == [A, C]
    topology.move(3, C)
    assert topology.primary_of(3) == C
    topology.move(6000, D)
    assert topology.primary_of(3) == D, "it is a slot of the shard of C and D"


def test_a_slot_moves_to_a_server_that_was_unknown(topology):
    new = Address("new", 5)
    topology.move(0, new)
    assert topology.primaries() == [new, A, C]
    assert new in topology.servers()


def test_what_one_server_does_not_know_another_may():
    one, other = Topology.parsed([[0, 10, server(A)]], A), Topology.parsed([[0, 16383, server(C)]], C)
    both = one.merged(other)
    assert not one.is_complete
    assert one.primary_of(11) is None
    assert both.is_complete
    assert [both.primary_of(slot) for slot in (10, 11)] == [A, C]
