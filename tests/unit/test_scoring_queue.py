"""The queue of the service: which images are scored together, and what becomes of the others when something fails."""

import threading
from concurrent.futures import CancelledError, Future
from contextlib import closing

import pytest

from farout.scoring.service.batching import ImageScore, ScoringQueue, SubmittedImage

WAIT = 60


class Scorer:
    """Scores an image by its length; a closed gate holds it, `broken` images raise."""

    def __init__(self) -> None:
        self.gate, self.entered = threading.Event(), threading.Semaphore(0)
        self.gate.set()
        self.batches: list[list[str]] = []

    def __call__(self, table: dict) -> dict:
        self.batches.append(list(table["key"]))
        self.entered.release()
        assert self.gate.wait(WAIT)
        if b"broken" in table["image"]:
            raise RuntimeError("no memory")
        count = len(table["key"])
        return {
            "key": table["key"],
            "score": [float(len(image)) for image in table["image"]],
            "p_value": [0.5] * count,
            "is_ood": [False] * count,
            "status": ["ok"] * count,
            "reason": [""] * count,
            "norm": [float("nan")] * count,
        }


def images(*keys: str, data: bytes = b"12") -> list[SubmittedImage]:
    return [SubmittedImage(key, data) for key in keys]


def keys_of(future: Future[list[ImageScore]]) -> list[str]:
    return [row.key for row in future.result(WAIT)]


@pytest.fixture
def scorer() -> Scorer:
    return Scorer()


def test_requests_that_arrive_while_the_networks_are_busy_are_scored_together(scorer: Scorer) -> None:
    with closing(ScoringQueue(scorer, batch_size=3, window_s=0)) as queue:
        scorer.gate.clear()
        first = queue.submit(images("a"))
        assert scorer.entered.acquire(timeout=WAIT)
        others = [queue.submit(images("b", "b")), queue.submit(images("c", "c")), queue.submit(images("d"))]
        scorer.gate.set()
        assert [keys_of(future) for future in (first, *others)] == [["a"], ["b", "b"], ["c", "c"], ["d"]]
    assert scorer.batches == [["a"], ["b", "b", "c"], ["c", "d"]], "full batches, in the order of arrival"


def test_an_image_waits_for_others_and_a_full_batch_does_not(scorer: Scorer) -> None:
    with closing(ScoringQueue(scorer, batch_size=2, window_s=3600)) as queue:
        first, second = queue.submit(images("a")), queue.submit(images("b"))
        assert (keys_of(first), keys_of(second)) == (["a"], ["b"])
        last = queue.submit(images("c"))
    assert keys_of(last) == ["c"], "a closed queue waits for nobody"
    assert scorer.batches == [["a", "b"], ["c"]]


def test_images_of_a_client_that_went_away_are_not_scored(scorer: Scorer) -> None:
    with closing(ScoringQueue(scorer, batch_size=2, window_s=0)) as queue:
        scorer.gate.clear()
        first = queue.submit(images("a"))
        assert scorer.entered.acquire(timeout=WAIT)
        gone, last = queue.submit(images("b", "b")), queue.submit(images("c"))
        assert gone.cancel()
        scorer.gate.set()
        assert (keys_of(first), keys_of(last)) == (["a"], ["c"])
    assert scorer.batches == [["a"], ["c"]]


def test_an_error_of_one_image_affects_no_other_request(scorer: Scorer) -> None:
    with closing(ScoringQueue(scorer, batch_size=4, window_s=3600)) as queue:
        first, broken = queue.submit(images("a", "b")), queue.submit(images("c", data=b"broken"))
        last = queue.submit(images("d"))
        assert (keys_of(first), keys_of(last)) == (["a", "b"], ["d"])
        with pytest.raises(RuntimeError, match="no memory"):
            broken.result(WAIT)
        assert queue.is_alive
    assert scorer.batches == [["a", "b", "c", "d"], ["a"], ["b"], ["c"], ["d"]]


def test_an_image_without_data_is_unreadable_and_not_scored(scorer: Scorer) -> None:
    with closing(ScoringQueue(scorer, batch_size=4, window_s=0)) as queue:
        rows = queue.submit([SubmittedImage("a", None, "too large"), *images("b")]).result(WAIT)
    assert [(row.status, row.reason, row.score) for row in rows] == [("unreadable", "too large", None), ("ok", None, 2)]
    assert rows[1].indicators == {"norm": None}, "JSON has no NaN"
    assert scorer.batches == [["b"]]


def test_a_closed_queue_finishes_what_it_accepted_and_refuses_more(scorer: Scorer) -> None:
    queue = ScoringQueue(scorer, batch_size=1, window_s=0)
    scorer.gate.clear()
    accepted = [queue.submit(images(key)) for key in "abc"]
    closing_thread = threading.Thread(target=queue.close)
    closing_thread.start()
    scorer.gate.set()
    closing_thread.join(WAIT)
    assert [keys_of(future) for future in accepted] == [["a"], ["b"], ["c"]]
    with pytest.raises(RuntimeError, match="closed"):
        queue.submit(images("d"))
    assert not queue.is_alive


def test_what_is_not_scored_when_the_time_is_over_is_cancelled(scorer: Scorer) -> None:
    queue = ScoringQueue(scorer, batch_size=1, window_s=0)
    scorer.gate.clear()
    first = queue.submit(images("a"))
    assert scorer.entered.acquire(timeout=WAIT)
    second = queue.submit(images("b"))
    assert not queue.close(timeout=0)
    with pytest.raises(CancelledError):
        second.result(WAIT)
    scorer.gate.set()
    with pytest.raises(CancelledError):
        first.result(WAIT)
    assert scorer.batches == [["a"]]
