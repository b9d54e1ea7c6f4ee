"""The use case behind `POST /recommend`, in stages: parse, encode, remember, rank, respond (`pipeline`)."""
