"""What can break: faults against a live cluster, and what must stay true while they last."""
