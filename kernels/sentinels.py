"""Numbers that stand for "none" in arrays of logits, queries and positions."""

# A masked logit: below every logit, and finite, so that differences with it stay defined and a
# softmax over masked logits alone is not NaN.
LOWEST = -1e30
# The query of entry of a token that never becomes a candidate; 2 NEVER_ENTERS + 1 fits an int32.
NEVER_ENTERS = 2**29
# The first query of an empty slot of a list.
NEVER = 2**30
# The position of an empty slot, later than any token's: the largest int32.
NOWHERE = 2**31 - 1
