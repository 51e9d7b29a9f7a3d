"""Helpers of several suites: toy models, toy arrays, and oracles in NumPy.

A module here imports only modules that exist on the earliest day that uses it.
"""
