"""Names of the score families of `sparsek.kernels.specs`, which flags need before JAX is there."""

SCORE_FAMILIES = ("normal", "rising", "falling", "equal", "ties", "huge", "tiny")
