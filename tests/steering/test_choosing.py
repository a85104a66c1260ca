"""Which strength is called the best, on numbers where it can be said by hand."""

from __future__ import annotations

import math

import pytest

from cadapter.steering.choosing import Choice, choose
from cadapter.training.scores import Contrast, Cost, Lean


def chosen(kl: dict[float, float], contrast: dict[float, float], budget: float = 0.1, error: float = 0.01) -> Choice:
    """The choice where half of each contrast is the lean of either side."""
    leans = [Lean(sign * t, sign * value / 2, error) for t, value in contrast.items() for sign in (-1, 1)]
    pairs = [Contrast((t, -t), value, error, 0.9) for t, value in contrast.items()]
    found = choose(pairs, [*leans, Lean(0.0, 0.0, 0.0)], [Cost(t, each, 0.0, 1.0) for t, each in kl.items()], budget)
    assert found is not None
    return found


KL = {0.0: 0.0, 0.5: 0.01, -0.5: 0.02, 1.0: 0.04, -1.0: 0.08, 2.0: 0.09, -2.0: 0.5}
CONTRAST = {0.5: 0.1, 1.0: 0.2, 2.0: 0.4}


@pytest.mark.parametrize(
    ("budget", "pair", "cost", "enhance", "suppress"),
    [
        (1.0, 2.0, 0.5, 2.0, -2.0),
        (0.5, 2.0, 0.5, 2.0, -2.0),  # a budget may be used up
        (0.1, 1.0, 0.08, 2.0, -1.0),  # at -2 it costs too much, which counts for the pair
        (0.03, 0.5, 0.02, 0.5, -0.5),
        (0.015, None, math.nan, 0.5, None),
        (0.001, None, math.nan, None, None),
    ],
)
def test_the_largest_contrast_within_the_budget(
    budget: float, pair: float | None, cost: float, enhance: float | None, suppress: float | None
) -> None:
    found = chosen(KL, CONTRAST, budget)
    assert (found.pair and found.pair.strengths[0]) == pair
    assert found.cost == pytest.approx(cost, nan_ok=True)
    assert (found.enhance, found.suppress) == (enhance, suppress)


def test_a_smaller_strength_may_be_the_best() -> None:
    found = chosen(dict.fromkeys(KL, 0.0), {0.5: 0.1, 1.0: 0.3, 2.0: 0.2})
    assert found.pair is not None
    assert found.pair.strengths == (1.0, -1.0)
    assert found.words[0] == "Best within the KL budget: strength ±1."
    assert "0.3000 ± 0.0100" in found.words[1]
    assert not any("largest strength tried" in each for each in found.words)


def test_what_the_words_say() -> None:
    largest = chosen(KL, CONTRAST, 1.0).words
    assert "largest strength tried" in largest[-1]
    assert "--strength -4:4:1" in largest[-1]
    sides = chosen(KL, CONTRAST, 0.1).words
    assert "+2 to enhance, -1 to suppress" in sides[-1]
    (nothing,) = chosen(KL, CONTRAST, 0.001).words
    assert "±0.5 has 0.0200" in nothing
    assert "--strength -0.5:0.5:0.1" in nothing
    (noise,) = chosen(KL, CONTRAST, 1.0, error=0.3).words
    assert "2 standard errors above zero" in noise
    assert chosen({**KL, 3.0: 0.0}, {}, 1.0).words == ("No pair of strengths ±t was compared.",)


def test_the_wrong_way_is_no_contrast() -> None:
    """An adapter that turns the classes the wrong way round is never recommended."""
    found = chosen(KL, {t: -value for t, value in CONTRAST.items()}, 1.0)
    assert (found.pair, found.enhance, found.suppress) == (None, None, None)


def test_without_both_classes_there_is_no_choice() -> None:
    assert choose([], [], [Cost(0.0, 0.0, 0.0, 1.0)], 0.1) is None


def test_what_has_no_standard_error_is_not_clear() -> None:
    leans = [Lean(sign * 1.0, sign * 0.5, math.nan) for sign in (-1, 1)]
    costs = [Cost(t, 0.0, 0.0, 1.0) for t in (-1.0, 0.0, 1.0)]
    found = choose([Contrast((1.0, -1.0), 1.0, math.nan, 1.0)], leans, costs, 0.1, single=[-1])
    assert found is not None
    assert (found.pair, found.enhance, found.suppress) == (None, None, None)
    assert found.words[0].startswith("There is one document of class −1: no standard error")
