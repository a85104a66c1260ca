"""The class of a token: which transformation of the adapter the position that predicts it receives.

A class is stored as one signed byte. ``NO_CLASS`` belongs to positions that predict nothing (the last of a
sequence, padding): no transformation, no loss, no count.
"""

from __future__ import annotations

POSITIVE = 1
NEGATIVE = -1
NEUTRAL = 0
NO_CLASS = 2

CLASS_NAMES = {POSITIVE: "positive", NEGATIVE: "negative", NEUTRAL: "neutral"}

IGNORED_LABEL = -100
"""The label of a position that carries no cross-entropy."""
