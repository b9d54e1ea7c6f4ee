"""The users' memory banks as a service: FAISS for search, Redis for truth. Never imports torch."""
