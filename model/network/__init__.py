"""The networks and their objectives: encoder, fusion, losses."""
