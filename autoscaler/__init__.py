"""How many replicas, on which machines, at what price: pure, from a snapshot to a decision."""
