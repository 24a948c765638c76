"""Tests with a real cluster: few and strong."""
