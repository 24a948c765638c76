"""The same three models, served by each system in the way its own documentation recommends.

Each file runs in that system's environment and imports nothing of Shoal.
"""
