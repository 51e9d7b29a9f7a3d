"""What several suites share: toy models, toy arrays, and oracles in NumPy.

A module here imports only what the earliest day that uses it may import.
"""
