"""Bounds of what both services accept from each other and from their callers."""

ID_LIMIT_BYTES = 256
"""Size of a user id or item id in UTF-8."""
TIME_LIMIT_S = 1e11
"""Bound for times in seconds (the year 5138); a larger number is probably in milliseconds."""
RATING_LIMIT = 1e9
"""Bound for ratings, well inside the range of a 32-bit float."""
UNIT_LIMIT = 1.01
"""Bound for the numbers of a vector of unit length; leaves room for rounding."""
NUMBER_LIMIT = 65504.0
"""Bound for the numbers of states and features: larger than any real one, small enough that squares stay finite."""
POSITION_LIMIT = 2**53
"""Bound for positions in a user's sequence, and for catalogue numbers, revisions and cursors."""
ENTRIES_LIMIT = 1000
"""Entries retrieved for one user; a bank holds no more."""
K_LIMIT = 100
"""K of one user; configurations and requests allow no more."""
USERS_PER_CALL = 2048
"""Users that one call to the memory service may name."""
