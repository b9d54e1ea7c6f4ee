"""The science of RAMRec: memory rules, banks, encoder, fusion, training, evaluation. No HTTP, no Redis."""
