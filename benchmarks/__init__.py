"""Measurements against other systems; nothing else in the repository imports from here."""
