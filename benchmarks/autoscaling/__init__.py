"""How long does the autoscaler think, and how does that grow with the cluster?

`python -m benchmarks.autoscaling.scale` measures, on this machine and in one process, and writes
`results/scale.json` and `results/scale.md`. Speeds are told here and never asserted in a test:
machines differ, and a busy one fails nobody's work.
"""
