"""Each process killed once in the middle of writes: nothing lost or doubled. `benchmarks.memory.crash` kills more."""

from benchmarks.memory.crash import Deployment, check


def test_nothing_is_lost_or_doubled_when_each_process_is_killed(run):
    report = check(run, items=30, kills=3, clients=2, seed=0, say=lambda line: None)
    assert report["kills"] == dict.fromkeys(Deployment.PARTS, 1)
    assert report["acknowledged"] > 50
    assert (report["missing"], report["phantom"], report["duplicates"]) == (0, 0, 0)
