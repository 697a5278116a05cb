"""How sure and how right a reward model is, against loops over its verdicts."""

import numpy as np
import pytest

from tests.losses import calibration


def loop(difference, buckets):
    """Counts, confidences and verdicts of each bucket, one comparison at a time."""
    found = [[] for _ in range(buckets)]
    for d in difference:
        p = 1 / (1 + np.exp(-abs(d)))
        place = min(int((p - 0.5) / 0.5 * buckets), buckets - 1)
        found[place].append((p, d > 0))
    return found


@pytest.mark.parametrize("buckets", [1, 3, 7])
def test_buckets_are_the_loop(buckets):
    difference = np.random.default_rng(0).normal(0.5, 2, 200)
    got = calibration.by_confidence(difference, buckets=buckets)
    error = 0.0
    for i, inside in enumerate(loop(difference, buckets)):
        assert got.counts[i] == len(inside)
        if inside:
            sure, right = np.mean(inside, axis=0)
            np.testing.assert_allclose(got.confidence[i], sure)
            np.testing.assert_allclose(got.accuracy[i], right)
            assert got.edges[i] <= sure <= got.edges[i + 1]
            error += len(inside) / 200 * abs(sure - right)
    np.testing.assert_allclose(
        calibration.expected_calibration_error(difference, buckets=buckets), error
    )


def test_honest_rewards_are_calibrated():
    rng = np.random.default_rng(1)
    true = rng.normal(0, 2, 200_000)
    wins = rng.random(true.size) < 1 / (1 + np.exp(-true))
    honest = np.where(wins, true, -true)  # chosen first, as labels fell
    assert calibration.expected_calibration_error(honest) < 0.01
    # Rewards three times too large rank alike but are too sure of it.
    boastful = calibration.by_confidence(3 * honest)
    assert calibration.expected_calibration_error(3 * honest) > 0.05
    assert (boastful.accuracy < boastful.confidence)[boastful.counts > 0].all()


def test_ties_and_extremes():
    ties = calibration.by_confidence(np.zeros(3), buckets=4)
    assert ties.counts.tolist() == [3, 0, 0, 0]
    assert ties.confidence[0] == 0.5 and ties.accuracy[0] == 0  # a tie is wrong
    assert np.isnan(ties.accuracy[1:]).all()
    sure = calibration.by_confidence([1e6, -np.inf], buckets=4)
    assert sure.counts.tolist() == [0, 0, 0, 2] and sure.accuracy[-1] == 0.5
    assert calibration.expected_calibration_error([]) == 0.0
    assert calibration.expected_calibration_error([50.0]) == pytest.approx(0)


def test_length_baseline():
    assert calibration.length_baseline([[5, 3], [9, 1], [2, 4]]) == pytest.approx(2 / 3)
    assert calibration.length_baseline([[3, 5], [1, 9], [4, 2]]) == pytest.approx(2 / 3)
    assert calibration.length_baseline([[4, 4], [7, 7]]) == 0.5
    assert calibration.length_baseline(np.zeros((0, 2), int)) == 0.5


def test_majority_baseline():
    assert calibration.majority_baseline([True, True, False]) == pytest.approx(2 / 3)
    assert calibration.majority_baseline([False, False, True]) == pytest.approx(2 / 3)
    assert calibration.majority_baseline([]) == 0.5
