"""The networks and their objectives: encoder, fusion, losses; and the device that they run on."""
