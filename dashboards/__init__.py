"""What we see: metrics, the queries over them, boards and alerts."""
