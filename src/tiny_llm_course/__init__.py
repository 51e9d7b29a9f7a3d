"""The course's machine: starters, test runs, hints, progress, and the proof that all of it holds together.

It knows the syllabus and Python source; it knows nothing of attention or of pages. `syllabus.toml` is the
only list of days. Learners reach it through `pdm run start`, `test`, `hint` and so on.
"""
