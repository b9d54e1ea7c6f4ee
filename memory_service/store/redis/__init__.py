"""How Redis is reached: one server or a Redis Cluster, behind one interface."""
