import json

import jax
import numpy as np
import pytest

from peftax.data import pipeline


def rows(n=11, length=4):
    tokens = np.arange(n * length, dtype=np.int32).reshape(n, length) + 1
    return {"tokens": tokens, "weights": np.ones((n, length), np.float32)}


def taken(stream, count):
    return [next(stream)["tokens"] for _ in range(count)]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("steps", [0, 1, 4, 9])
def test_resume_gives_the_same_batches_to_the_bit(steps, accumulate):
    make = lambda: pipeline.batches(rows(), batch_size=2, seed=5, accumulate=accumulate)  # noqa: E731
    through = make()
    taken(through, steps)
    state = json.loads(json.dumps(through.get_state()))
    after = taken(through, 12)
    resumed = make()
    taken(resumed, 3)  # wherever it was
    resumed.set_state(state)
    assert all((a == b).all() for a, b in zip(after, taken(resumed, 12), strict=True))
    assert resumed.get_state() == through.get_state()


def test_each_epoch_is_another_order_of_the_same_rows():
    stream = pipeline.batches(rows(12), batch_size=3, seed=0, epochs=3)
    assert len(stream) == 12 and stream.per_epoch == 4
    batches = [b["tokens"] for b in stream]
    epochs = [np.concatenate(batches[i : i + 4])[:, 0] for i in (0, 4, 8)]
    assert all(sorted(e) == sorted(epochs[0]) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3
    assert stream.epoch == 3
    with pytest.raises(StopIteration):
        next(stream)


def test_seed_sets_the_order():
    first = [taken(pipeline.batches(rows(), batch_size=4, seed=s), 2) for s in (0, 0, 1)]
    assert np.array_equal(first[0], first[1]) and not np.array_equal(first[0], first[2])
    items = list(range(20))
    assert pipeline.shuffle(items, 3) == pipeline.shuffle(items, 3) != pipeline.shuffle(items, 4)
    assert sorted(pipeline.shuffle(items, 3)) == items


def test_accumulation_stacks_the_same_rows():
    whole = pipeline.batches(rows(), batch_size=4, seed=1)
    stacked = pipeline.batches(rows(), batch_size=2, accumulate=2, seed=1)
    for _ in range(5):
        a, b = next(whole), next(stacked)
        assert b["tokens"].shape == (2, 2, 4)
        assert (a["tokens"] == b["tokens"].reshape(4, 4)).all()


def test_remainder_is_filled_up_with_empty_rows():
    stream = pipeline.batches(rows(), batch_size=4, seed=0, epochs=1, drop_remainder=False, shuffled=False)
    got = list(stream)
    assert [b["tokens"].shape for b in got] == [(4, 4)] * 3
    assert (np.concatenate([b["tokens"] for b in got])[:11] == rows()["tokens"]).all()
    assert got[-1]["weights"].sum() == 3 * 4 and not got[-1]["tokens"][3].any()
    assert got[-1]["weights"].dtype == np.float32


def test_another_runs_state_is_refused():
    stream = pipeline.batches(rows(), batch_size=2, seed=0)
    state = stream.get_state()
    for other in (
        pipeline.batches(rows(), batch_size=2, seed=1),
        pipeline.batches(rows(), batch_size=4, seed=0),
        pipeline.batches(rows(13), batch_size=2, seed=0),
        pipeline.batches({**rows(), "tokens": rows()["tokens"] + 1}, batch_size=2, seed=0),
        pipeline.batches({**rows(), "weights": rows()["weights"] + 1}, batch_size=2, seed=0),
    ):
        with pytest.raises(ValueError, match="the saved data position has"):
            other.set_state(state)


def test_too_few_rows_for_a_batch():
    with pytest.raises(ValueError, match="11 rows do not fill one batch of 2 x 8"):
        pipeline.batches(rows(), batch_size=8, accumulate=2, seed=0)
    with pytest.raises(ValueError, match="at least 1"):
        pipeline.batches(rows(), batch_size=0, seed=0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_device_gets_the_rows_that_are_its_own(monkeypatch, accumulate):
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:4]), ("data",))
    lead = (None,) if accumulate > 1 else ()
    at = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*lead, "data"))
    data = {"tokens": np.arange(1, 45, dtype=np.int32).reshape(22, 2)}
    kept = dict(batch_size=8, seed=0, epochs=1, accumulate=accumulate, drop_remainder=False)
    whole = list(pipeline.batches(data, **kept))
    asked, taken = [], pipeline._taken
    monkeypatch.setattr(pipeline, "_taken", lambda array, chosen: asked.append(chosen.size) or taken(array, chosen))
    placed = pipeline.batches(data, **kept)
    for batch in whole:
        np.testing.assert_array_equal(placed.place(lambda _: at)["tokens"], batch["tokens"])
    assert set(asked) == {2 * accumulate}
    assert (whole[-1]["tokens"] == 0).all(axis=-1).sum() == {1: 2, 2: 10}[accumulate]  # it is filled up
