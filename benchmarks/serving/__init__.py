"""How does Shoal compare, side by side and on this machine, with what others use to serve models?

    systems ─ start, check ─► load ─ rounds, medians ─► report
       │                        │
    environments, peers      processes (CPU and memory of the whole tree)

Every system runs in an environment of its own, answers the same questions, and has to be right
before it may be fast. `python -m benchmarks.serving --help` says how; README.md says what was
found, and how to read it.
"""
